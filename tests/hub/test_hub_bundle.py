"""Bundles of the Hub by name: their files and no others are fetched, checked, opened in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from bundle_helpers import failed, invoke
from gguf_builder import small_model
from hub_server import FakeHub, fresh
from q6k_convert.cli.given import bundle_path
from q6k_convert.cli.terminal import Terminal
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.hub import parse
from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.bundle.published import directory_of

OTHERS = {
    "README.md": b"# mine",
    "pytorch_model.bin": bytes(2000),
    "code.py": b"import os",
    "sub/bundle.json": b"{}",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        convert(small_model().write(tmp_path / "model.gguf"), tmp_path / "made", Options(max_shard_size=2000))
        files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
        served.add("org/bundle", files | OTHERS)
        served.add("org/bundle", files | {"bundle.json": b"{}"}, "broken")
        yield served


def test_a_bundle_of_the_hub_is_verified_by_its_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reference in ("org/bundle", "org/bundle@main"):
        result = invoke("verify", reference, "--source", tmp_path / "model.gguf")
        assert result.exit_code == 0, result.output
    made = {path.name for path in (tmp_path / "made").iterdir()}
    fetched = [asked.path.rpartition("/")[2] for asked in hub.contents()]
    assert sorted(fetched) == sorted({*made, "README.md"})  # which may be one that `hf` wrote
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = bundle_path("org/bundle", "q6k-convert verify", Terminal(quiet=True))
    assert {path.name for path in place.iterdir()} == {*made, "README.md"}
    assert all(path.is_symlink() for path in place.iterdir())
    assert len(hub.asked) == asked


def test_generate_takes_a_bundle_of_the_hub(hub: FakeHub) -> None:
    # This model has no vocabulary: that is found in the cache's files, after they have been fetched.
    result = invoke("generate", "org/bundle", "-p", "x", "--device", "cpu")
    assert result.exit_code == 3
    assert "models--org--bundle/snapshots/" in result.stderr
    assert len(hub.contents()) > 2


def test_a_path_that_exists_wins(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "made").rename(tmp_path / "org" / "bundle")
    assert invoke("verify", "org/bundle").exit_code == 0
    assert bundle_path("org/bundle", "q6k-convert verify", Terminal(quiet=True)) == Path("org/bundle")
    failed(invoke("verify", "org/other"), 4, "org/other: No such file or directory", "Check the path")
    assert directory_of("org/other") == Path("org/other")
    assert hub.asked == []


def test_what_is_no_bundle_is_refused(hub: FakeHub) -> None:
    hub.add("org/gguf", {"a-Q6_K.gguf": small_model().build()})
    failed(
        invoke("verify", "org/gguf"), 3, "the repository is not a bundle: it has no bundle.json, metadata.gguf",
        "convert one: `q6k-convert org/gguf:QUANTISATION OUT/`",
    )  # fmt: skip
    assert hub.contents() == []
    assert invoke("verify", "org/bundle@broken").exit_code in (3, 5)
    failed(invoke("verify", "org/none"), 4, "org/none: No such file or directory; and taken for", "Check the path")


def test_a_damaged_file_is_refused(hub: FakeHub) -> None:
    hub.corrupt = lambda content: content[:-1] + b"!"
    failed(invoke("verify", "org/bundle"), 4, "it has the hash", "has been removed")


@pytest.mark.parametrize("text", ["out", "a/b/c", "/a/b", "./a", "a/b.gguf", "a/b@", "a//b", "../b", "a/.."])
def test_what_is_no_reference_is_a_path(text: str) -> None:
    assert parse(text, bundle=True) is None


def test_python_takes_a_bundle_of_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from q6k_kernels import open_bundle

    bundle = open_bundle("org/bundle@main")
    assert bundle.path.parent.name == "snapshots"
    assert {path.name for path in bundle.path.iterdir()} == {path.name for path in (tmp_path / "made").iterdir()}
    assert list(bundle) == list(open_bundle(tmp_path / "made"))
    assert directory_of(bundle.path / "metadata.gguf") == bundle.path / "metadata.gguf"
    with pytest.raises(
        BundleError, match="org/none is not a bundle: there is no such directory, and not on the Hub"
    ):
        open_bundle("org/none")


@pytest.mark.parametrize("text", ["out", "a/b/c", "/a/b", "./a", "a//b", "../b"])
def test_what_is_no_name_is_a_path(text: str) -> None:
    assert directory_of(text) == Path(text)
