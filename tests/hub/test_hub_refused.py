"""What is no reference, what the Hub refuses or says wrongly, and content that is not what it lists."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from bundle_helpers import failed, invoke, listing
from gguf_builder import small_model
from hub_server import FakeHub, digest, fresh
from q6k_convert.hub import fetch, hashes, names, parse

MODEL = small_model().build()
NAME = "tiny-Q6_K.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        served.add("org/tiny", {NAME: MODEL})
        yield served


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


# Paths and references


@pytest.mark.parametrize(
    "path",
    [
        "models/foo.gguf", "foo.gguf", "./org/tiny/foo.gguf", "/org/tiny/foo.gguf", "../org/tiny/foo.gguf",
        "here/tiny/foo.gguf", "org/tiny/../foo.gguf", "here/tiny", "org/tiny/foo.bin", "org/foo.safetensors",
        "org/tiny.gguf:Q6_K",
        "org/ti--ny:Q6_K", "org/ti..ny:Q6_K", "org/tiny@../x:Q6_K", "org/tiny@a/b:Q6_K", "org:Q6_K", "org/tiny:",
        "-org/tiny:Q6_K", "org/tiny@-x:Q6_K", "org/tiny:../x", "org/tiny@v\n:Q6_K", "org/tïny:Q6_K",
    ],
)  # fmt: skip
def test_a_mistyped_path_is_an_error_as_ever(path: str, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path).removeprefix("./")
    failed(invoke("convert", "--", path, "out"), 4, f"{shown}: No such file", "Check the path and its permissions.")
    assert hub.asked == []


@pytest.mark.parametrize("path", ["org/tiny:Q6_K", f"org/tiny/{NAME}", f"org/tiny@main/{NAME}"])
def test_what_exists_is_no_reference(path: str, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(MODEL)
    assert invoke(path, "out").exit_code == 0
    assert hub.asked == []
    (tmp_path / path).unlink()
    (tmp_path / path).symlink_to("nowhere")
    failed(invoke(path, "more"), 4, "No such file", "Check the path")
    assert hub.asked == []


def test_what_may_be_either_is_said_to_be_neither(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "modles/tiny/foo.gguf"
    both = f"{path}: No such file or directory; and taken for a file of the Hub: "
    failed(invoke(path, "out"), 4, f"{both}http://127.0.0.1", "Check the path and its permissions; or, if the Hub")
    hub.listing_failures = [500]
    failed(invoke(path, "out"), 4, f"{both}http://127.0.0.1", "if the Hub is meant: Run the same command again")
    monkeypatch.setattr(fetch, "version", absent)
    failed(invoke(path, "out"), 4, f"{both}for files of the Hub huggingface_hub", "q6k-convert[hub]")


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("https://huggingface.co/org/tiny", "org/tiny"),
        ("https://huggingface.co/org/tiny/tree/main", "org/tiny"),
        ("https://huggingface.co/org/tiny/tree/v1.0/sub", "org/tiny@v1.0"),
        ("https://huggingface.co/org/tiny:Q6_K", "org/tiny:Q6_K"),
        ("https://huggingface.co/org/tiny/resolve/main/a/X.gguf?download=true", "org/tiny/a/X.gguf"),
        ("https://huggingface.co/org/tiny/blob/v1.0/X%20y.gguf#L1", "org/tiny@v1.0/X y.gguf"),
        ("https://huggingface.co/org/tiny/blob/refs%2Fpr%2F3/X.gguf", "org/tiny@refs/pr/3/X.gguf"),
        ("https://huggingface.co/org/tiny?show_file_info=a%2FX.gguf", "org/tiny/a/X.gguf"),
        ("http://hf.co/org/tiny/", "org/tiny"),
        ("hf.co/org/tiny:Q6_K", "org/tiny:Q6_K"),
        ("huggingface.co/org/tiny/resolve/main/X.gguf", "org/tiny/X.gguf"),
        ("HF://org/tiny@v1.0/X.gguf", "org/tiny@v1.0/X.gguf"),
        ("https://mirror.test:8443/org/tiny/resolve/main/X.gguf", "org/tiny/X.gguf"),
    ],
)
def test_an_address_is_the_reference_it_leads_to(address: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.test:8443")
    found = parse(address)
    assert found is not None
    assert (found.text, found.certain) == (text, True)
    assert replace(found, certain=False) == replace(parse(text) or found, certain=False)


@pytest.mark.parametrize(
    "address",
    [
        "https://user:secret@huggingface.co/org/tiny/resolve/main/X.gguf", "https://huggingface.co/org",
        "https://huggingface.co/datasets/org/tiny/resolve/main/X.gguf?token=secret", "https://[::1/org/tiny:Q6_K",
        "https://huggingface.co/org/tiny/resolve/main/model.safetensors", "s3://bucket/X.gguf", "hf://org/../x:Q6_K",
        "https://evil.test/org/tiny/resolve/main/X.gguf?token=secret", "https://huggingface.co@evil.test/org/tiny",
        "https://huggingface.co/org/tiny/resolve/main/%2e%2e/X.gguf", "file:///models/X.gguf", "hf.co/org",
    ],
)  # fmt: skip
def test_any_other_address_is_named_and_not_opened(address: str, hub: FakeHub) -> None:
    result = invoke("inspect", address)
    failed(result, 3, "an address that cannot be opened: ", "Download the GGUF file and give its path")
    assert "secret" not in result.output
    assert hub.asked == []


def test_a_repository_alone_lists_what_it_has(hub: FakeHub) -> None:
    hub.add("org/many", {f"{name}.gguf": MODEL for name in ("a-Q4_K_M", "a-Q8_0-00001-of-00001", "mmproj-a")})
    listed = "org/many: on the Hub: it has 3 GGUF models, and none is named: Q4_K_M, Q8_0"
    for text in ("org/many", "https://huggingface.co/org/many/tree/main"):
        failed(invoke(text, "out"), 3, listed, "Name one, like `org/many:Q4_K_M`.")
    hub.add("org/plain", {"b.gguf": MODEL}, "v1")
    failed(invoke("inspect", "org/plain@v1"), 3, "none is named: b.gguf", "like `org/plain@v1/b.gguf`")
    failed(invoke("inspect", "org/none"), 4, "org/none: No such file or directory; and taken for a", "if the Hub")
    assert hub.contents() == []


def test_without_the_extra_a_reference_is_exit_6(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, what in ((absent, "none"), (lambda _: "0.36.2", "0.36.2"), (lambda _: "1.30.9", "1.30.9")):
        monkeypatch.setattr(fetch, "version", found)
        for args in (("org/tiny:Q6_K", "out"), ("inspect", f"org/tiny@main/{NAME}")):
            failed(invoke(*args), 6, f"1.31 or later is needed, and {what} is installed", "'q6k-convert[hub]'")
    assert hub.asked == []


def test_a_reference_is_taken_apart() -> None:
    found = parse("a.b/c_d@refs/pr/12/e f/g-00001-of-00002.gguf")
    assert found is not None
    assert (found.repository, found.revision, found.file) == (
        "a.b/c_d", "refs/pr/12", "e f/g-00001-of-00002.gguf"
    )  # fmt: skip
    assert found.certain


# What is not there


def test_what_is_not_there_is_exit_3(hub: FakeHub) -> None:
    failed(invoke("org/none:Q6_K", "out"), 3, "has no repository org/none, or it takes an HF_TOKEN", "/org/none")
    failed(invoke("org/tiny@v9:Q6_K", "out"), 3, "org/tiny has no revision 'v9'", "Look at http")
    failed(invoke("org/tiny@main/x.gguf", "out"), 3, f"no such file; there are: {NAME}", "Name one")
    hub.add("org/text", {"README.md": b"x"})
    failed(invoke("org/text:Q6_K", "out"), 3, "has no GGUF file", "Name one that has")
    hub.add("org/part", {"a-Q6_K-00002-of-00003.gguf": MODEL})
    failed(invoke("org/part:Q6_K", "out"), 3, "00001-of-00003.gguf, a-Q6_K-00003-of-00003.gguf", "whole")
    assert hub.contents() == []


def test_a_quantisation_that_no_file_or_several_have_is_listed(hub: FakeHub) -> None:
    many = ("a-Q4_K_M", "a.IQ2_xxs", "a_f16", "Q8_0/a", "a-UD-Q6_K_XL", "a-Q6_K-00001-of-00001", "mmproj-a-BF16")
    hub.add("org/many", {f"{name}.gguf": MODEL for name in many})
    for wrong in ("Q5_K", "Q6_K_XL", "K", "BF16"):
        cause = "no file of this quantisation; there are: F16, IQ2_XXS, Q4_K_M, Q6_K, Q8_0, UD-Q6_K_XL"
        failed(invoke(f"org/many:{wrong}", "out"), 3, cause, "Name one of those")
    hub.add("org/two", {f"{name}-Q6_K.gguf": MODEL for name in ("a", "b/c")})
    remedy = "Name the file: `org/two@main/a-Q6_K.gguf`"
    failed(invoke("org/two:Q6_K", "out"), 3, "2 files of this quantisation: a-Q6_K.gguf, b/c-Q6_K.gguf", remedy)
    hub.add("org/lots", {f"{number}-Q6_K.gguf": MODEL for number in range(50)})
    failed(invoke("org/lots:Q6_K", "out"), 3, "and 30 more", "Name the file")
    assert hub.contents() == []


@pytest.mark.parametrize("status", [500, 503, 418])
def test_a_hub_in_trouble_is_exit_4(status: int, hub: FakeHub) -> None:
    for failures in (hub.listing_failures, hub.head_failures):
        failures.extend([status] * 20)
        failed(invoke("org/tiny:Q6_K", "out"), 4, f"answers with HTTP status {status}", "again later")
        failures.clear()
    hub.failures = [("status", status)]
    failed(invoke("org/tiny:Q6_K", "out"), 4, f"answers with HTTP status {status}", "again later")


def test_a_file_that_is_closed_or_gone_is_exit_3(hub: FakeHub) -> None:
    hub.failures = [("status", 403)]
    failed(invoke("org/tiny:Q6_K", "out"), 3, "org/tiny is closed to us (HTTP status 403)", "Look at http")
    hub.tamper = entry(rfilename="other-Q6_K.gguf")
    failed(invoke("org/tiny:Q6_K", "out"), 3, "a file that it lists is not there", "name a commit")


@pytest.mark.parametrize("status", [("cut", 10), ("stall", 10)])
def test_a_connection_that_gets_nowhere_is_given_up(
    status: tuple[str, int], hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.failures = [status, *[(status[0], 0)] * 10]
    reason = {"cut": "RemoteProtocolError", "stall": "ReadTimeout"}[status[0]]
    failed(invoke("org/tiny:Q6_K", "out"), 4, f"cannot be read from: {reason}", "Run the same command again")
    hub.ended.set()


# What is malformed


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda listing: listing | {"siblings": [listing["siblings"][0] | changes]}


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"name {name[:20]!r}": entry(rfilename=name)
        for name in (
            "../x-Q6_K.gguf", "/x-Q6_K.gguf", "a/../../x-Q6_K.gguf", "a//x-Q6_K.gguf", "./x-Q6_K.gguf",
            "a\\x-Q6_K.gguf", "a\x1b[31m-Q6_K.gguf", "a\0-Q6_K.gguf", "a" * 256 + "-Q6_K.gguf",
            "a/" * 500 + "x-Q6_K.gguf", "C:x-Q6_K.gguf", "\ud800-Q6_K.gguf",
        )
    },
    "name missing": entry(rfilename=None),
    "twice": lambda listing: listing | {"siblings": listing["siblings"] * 2},
    **{f"size {size!r}": entry(size=size) for size in (-1, 0, 23, 1 << 60, 1e9, True, "8480", None)},
    **{
        f"hash {str(lfs)[:30]}": entry(lfs=lfs)
        for lfs in (
            *({"sha256": sha256, "size": 8480, "pointerSize": 135} for sha256 in ("../" * 21 + "x", "a" * 63, 5)),
            {"sha256": "a" * 64}, [5], "x",
        )
    },
    "hash of git": entry(lfs=None, blobId="../x"),
    **{f"commit {sha!r}": lambda listing, sha=sha: listing | {"sha": sha} for sha in ("../x", "main", None, 5)},
    "files no list": lambda listing: listing | {"siblings": {"a": 1}},
    "files of numbers": lambda listing: listing | {"siblings": [1]},
    "no object": lambda listing: [listing],
    "no JSON": lambda _: b"<html>",
    "no UTF-8": lambda _: b"\xff\xfe{",
    "nested": lambda _: b"[" * 100_000,
    "many": lambda listing: listing | {"siblings": [{"rfilename": "x"}] * 1001},
}  # fmt: skip


@pytest.mark.parametrize("tamper", HOSTILE.values(), ids=HOSTILE)
def test_a_malformed_answer_is_refused(
    tamper: Callable[[dict[str, Any]], Any], hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "MAX_FILES", 1000)
    hub.tamper = tamper
    result = invoke("org/tiny:Q6_K", "out")
    failed(result, 3, "on the Hub: its answer is malformed: ", "Check HF_ENDPOINT")
    assert not {"\x1b", "\0"} & set(result.output)
    assert hub.contents() == []
    assert listing(tmp_path) == {}


def test_a_commit_is_that_commit_or_refused(hub: FakeHub) -> None:
    commit, other = hub.repositories["org/tiny"].commits["main"], "0" * 40
    hub.tamper = lambda listing: listing | {"sha": other}
    failed(
        invoke(f"org/tiny@{commit}:Q6_K", "out"), 3, f"malformed: it is about commit {other}", "Check HF_ENDPOINT"
    )
    hub.tamper = lambda listing: listing
    hub.commit = other
    failed(invoke("org/tiny:Q6_K", "out"), 3, f"malformed: {NAME} is not of commit {commit}", "Check HF_ENDPOINT")
    assert hub.contents() == []


# Content


def blobs(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home" / "hub" / "models--org--tiny" / "blobs").iterdir())


def test_content_that_is_not_what_was_listed_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    for corrupt, cause, remedy in (
        (
            lambda content: content[:-1] + b"!",
            f"expected {digest(MODEL)}",
            "has been removed: run the same command",
        ),
        (lambda content: content + b"!", "a file of another length than announced", "Run the same command again"),
        (lambda content: content[:-1], "a file of another length than announced", "Run the same command again"),
    ):
        hub.corrupt = corrupt
        failed(invoke("org/tiny:Q6_K", "out"), 4, cause, remedy)
        assert blobs(tmp_path) == []
        assert not (tmp_path / "out").exists()
    hub.corrupt = lambda content: content
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0


@pytest.mark.parametrize("offline", [False, True])
def test_a_damaged_cache_is_named(
    offline: bool, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    (blob,) = blobs(tmp_path)
    before = blob.stat()
    for content in (MODEL[:100], MODEL[:-1] + b"!"):
        blob.write_bytes(content)
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
        failed(invoke("org/tiny:Q6_K", "more"), 4, f"expected {digest(MODEL)}", f"damaged: remove {blob} and run")
    assert len(hub.contents()) == 1


def test_a_check_is_remembered_while_the_file_stays_the_same(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = list[str]()

    def counted(file: names.HubFile, *more: Any) -> str:
        checked.append(file.name)
        return real(file, *more)

    real = hashes._digest
    monkeypatch.setattr(hashes, "_digest", counted)
    for _ in range(2):
        assert invoke("inspect", "org/tiny:Q6_K").exit_code == 0
    assert checked == [NAME]
    (blob,) = blobs(tmp_path)
    blob.touch()
    assert invoke("inspect", "org/tiny:Q6_K").exit_code == 0
    assert checked == [NAME] * 2
    # Where nothing can be remembered, every run checks.
    shutil.rmtree(tmp_path / "home" / "assets")
    (tmp_path / "home" / "assets").touch()
    for _ in range(2):
        assert invoke("inspect", "org/tiny:Q6_K").exit_code == 0
    assert checked == [NAME] * 4


def test_a_cache_without_links_is_checked_against_the_listing(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    for _ in range(2):
        assert invoke("inspect", "org/tiny:Q6_K").exit_code == 0
    assert len(hub.contents()) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(
        invoke("inspect", "org/tiny:Q6_K"),
        4,
        f"{NAME}: the cache does not say its hash",
        "give the file by this path",
    )


def test_what_cannot_end_well_is_not_begun(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    failed(invoke("org/tiny:Q6_K", "taken"), 4, "the output taken is not empty", "Give a new directory")
    assert hub.asked == []
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 7000)
    failed(invoke("org/tiny:Q6_K", "out"), 4, f"{NAME}: huggingface_hub refuses to download it", "Install hf_xet")
    real = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=7839))
    failed(invoke("org/tiny:Q6_K", "out"), 4, "takes 7.84 kB (7840 bytes), 7.84 kB are free", "HF_HUB_CACHE")
    assert hub.contents() == []
