"""The output transaction: what is refused, and that a bundle appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bundle_helpers import BROKEN_LATE, broken_late, checked_manifest, listing, run_cli, two_tensors
from q6k_convert.convert import locking, placing
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.errors import IOFailedError
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.errors import GgufRejectedError

Change = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return two_tensors().write(tmp_path / "in" / "model.gguf")


def refused(model: Path, out: Path, message: str, *, force: bool = True) -> IOFailedError:
    with pytest.raises(IOFailedError, match=message) as caught:
        convert(model, out, force=force)
    assert caught.value.remedy
    return caught.value


# What is in the way


def test_an_existing_bundle_is_refused_without_force(model: Path, home: Path) -> None:
    convert(model, home / "out")
    old = listing(home)
    error = refused(model, home / "out", f"the output {home / 'out'} is already a bundle", force=False)
    assert "--force" in error.remedy
    assert listing(home) == old


def test_force_replaces_a_bundle_only_once_the_new_one_is_whole(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(two_tensors(rows=9, seed=9).write(home / "other.gguf"), home / "out", Options(max_shard_size=1))
    old = listing(home / "out")
    seen = []
    put = placing.put
    monkeypatch.setattr(placing, "put", lambda *given: (seen.append(listing(home / "out")), put(*given)))
    convert(model, home / "out", force=True)
    assert seen == [old]
    convert(model, home / "fresh")
    assert listing(home / "out") == listing(home / "fresh")
    assert sorted(p.name for p in home.iterdir()) == ["fresh", "other.gguf", "out"]


def test_a_failing_run_with_force_leaves_the_old_bundle_as_it_was(model: Path, home: Path) -> None:
    convert(model, home / "out")
    broken = broken_late().write(home / "broken.gguf")
    before = listing(home)
    with pytest.raises(GgufRejectedError, match=BROKEN_LATE):
        convert(broken, home / "out", force=True)
    assert listing(home) == before


def _symlinked_file(out: Path) -> None:
    (out / "metadata.gguf").rename(out.parent / "elsewhere")
    (out / "metadata.gguf").symlink_to(out.parent / "elsewhere")


def _damaged(out: Path) -> None:
    path = out / "bundle.json"
    path.write_bytes(path.read_bytes().replace(b'"llama"', b'"llamb"'))


FOREIGN: dict[str, tuple[Change, str]] = {
    "a file": (lambda out: (out / "notes.txt").write_text("mine"), "not part of its bundle: notes.txt"),
    "a directory": (lambda out: (out / "sub").mkdir(), "not part of its bundle: sub"),
    "a directory named like a shard": (
        lambda out: ((out / "model.safetensors").unlink(), (out / "model.safetensors").mkdir()),
        "not part of its bundle: model.safetensors",
    ),
    "a shard of another bundle": (
        lambda out: (out / "model-00001-of-00002.safetensors").write_bytes(b""),
        "not part of its bundle: model-00001-of-00002.safetensors",
    ),
    "a symlink with the name of a file of ours": (_symlinked_file, "not part of its bundle: metadata.gguf"),
    "a dangling symlink": (lambda out: (out / "x").symlink_to("nowhere"), "not part of its bundle: x"),
    "a manifest that was altered": (_damaged, "not a whole bundle .*the file was altered"),
    "a manifest that is no JSON": (lambda out: (out / "bundle.json").write_text("{"), "not valid JSON"),
    "a manifest of another format": (
        lambda out: (out / "bundle.json").write_text(json.dumps({"format": "app", "version": 1})),
        "not a whole bundle .*expected 'q6k-planar', found 'app'",
    ),
    "no manifest": (lambda out: (out / "bundle.json").unlink(), "not a whole bundle .*no bundle.json"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_directory_with_anything_foreign_is_refused_even_with_force(what: str, model: Path, home: Path) -> None:
    change, message = FOREIGN[what]
    convert(model, home / "out")
    change(home / "out")
    before = listing(home)
    refused(model, home / "out", message)
    assert listing(home) == before


def test_a_bundle_that_lists_files_no_conversion_writes_is_refused_before_anything_happens(
    model: Path, home: Path
) -> None:
    convert(model, home / "out")
    (home / "out" / "tokenizer.json").write_text("{}")
    manifest = manifests.read(home / "out")
    manifest.files["tokenizer.json"] = manifests.StoredFile(2, 2, manifests.checksum(b"{}"))
    (home / "out" / "bundle.json").write_bytes(manifests.serialize(manifest))
    checked_manifest(home / "out")
    before = listing(home)
    refused(model, home / "out", "tokenizer.json")
    assert listing(home) == before


def test_an_existing_empty_directory_is_used_and_kept_if_the_run_fails(model: Path, home: Path) -> None:
    (home / "out").mkdir()
    with pytest.raises(GgufRejectedError, match=BROKEN_LATE):
        convert(broken_late().write(model), home / "out")
    assert listing(home) == {"out": None}
    convert(two_tensors().write(model), home / "out")
    checked_manifest(home / "out")
    assert [p.name for p in home.iterdir()] == ["out"]


def test_a_file_in_the_way_is_refused(model: Path, home: Path) -> None:
    (home / "out").write_text("mine")
    refused(model, home / "out", "exists and is not a directory")
    assert listing(home) == {"out": b"mine"}


def test_an_output_below_a_file_is_an_error_with_its_name(model: Path, home: Path) -> None:
    (home / "file").write_text("mine")
    with pytest.raises(OSError, match="Not a directory") as caught:
        convert(model, home / "file" / "deep" / "out")
    assert str(home / "file") in str(caught.value)
    assert listing(home) == {"file": b"mine"}


def test_a_symlink_that_points_to_itself_is_an_io_error_and_no_bug(model: Path, home: Path) -> None:
    (home / "out").symlink_to("out")
    done = run_cli(model, home / "out")
    assert (done.returncode, "This is a bug" in done.stderr) == (4, False), done.stderr
    assert listing(home) == {"out": "out"}


def test_an_output_given_as_a_dangling_symlink_is_made_where_it_points(model: Path, home: Path) -> None:
    (home / "out").symlink_to("real")
    convert(model, home / "out")
    checked_manifest(home / "real")
    assert sorted(p.name for p in home.iterdir()) == ["out", "real"]


# Output and input


def test_the_input_itself_is_refused_as_output(model: Path, home: Path) -> None:
    refused(model, model, "are the same or nested")
    (home / "hard").hardlink_to(model)
    refused(model, home / "hard", "is the input itself")
    (home / "soft").symlink_to(model)
    refused(model, home / "soft", "are the same or nested")
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.gguf"]


def test_a_directory_that_holds_the_input_is_refused(model: Path, home: Path) -> None:
    content = model.read_bytes()
    refused(model, model.parent, "are the same or nested")
    refused(model, model.parent.parent, "are the same or nested")
    (home / "link").symlink_to(model.parent)
    refused(model, home / "link", "are the same or nested")
    for kind in ("hard", "soft"):
        (home / kind).mkdir()
        inside = home / kind / "renamed.gguf"
        inside.hardlink_to(model) if kind == "hard" else inside.symlink_to(model)
        refused(model, home / kind, "holds the input itself, as renamed.gguf")
        refused(inside, home / kind, "are the same or nested|holds the input itself")
    assert model.read_bytes() == content
    assert sorted(listing(home)) == ["hard", "hard/renamed.gguf", "link", "soft", "soft/renamed.gguf"]


def test_an_output_nested_under_the_input_is_refused(model: Path) -> None:
    refused(model, model / "out", "are the same or nested")
    refused(model, model / "deep" / "out", "are the same or nested")


# Parents


def test_missing_parents_are_made_and_removed_again_if_the_run_fails(model: Path, home: Path) -> None:
    (home / "kept").mkdir()
    with pytest.raises(GgufRejectedError, match=BROKEN_LATE):
        convert(broken_late().write(home / "broken.gguf"), home / "kept" / "a" / "b" / "out")
    assert sorted(listing(home)) == ["broken.gguf", "kept"]
    convert(model, home / "kept" / "a" / "b" / "out")
    checked_manifest(home / "kept" / "a" / "b" / "out")


def test_a_parent_that_somebody_else_has_begun_to_use_is_kept(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*_: object) -> None:
        (home / "a" / "theirs").touch()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(placing, "put", put)
    with pytest.raises(OSError, match="Input/output error"):
        convert(model, home / "a" / "out")
    assert listing(home) == {"a": None, "a/theirs": b""}


# The partial directory


def test_what_a_killed_run_left_is_cleared_and_its_place_reused(model: Path, home: Path) -> None:
    partial = home / ".out.q6k-partial"
    partial.mkdir()
    for name in (
        "model-00001-of-00007.safetensors",
        "model.safetensors.index.json",
        "metadata.gguf",
        "bundle.json",
    ):
        (partial / name).write_text("half")
    convert(model, home / "out")
    checked_manifest(home / "out")
    assert [p.name for p in home.iterdir()] == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "model.safetensors/", "model-1-of-2.safetensors"])
def test_a_partial_directory_with_foreign_files_is_refused_and_left_alone(
    foreign: str, model: Path, home: Path
) -> None:
    partial = home / ".out.q6k-partial"
    partial.mkdir()
    (partial / "bundle.json").write_text("half")
    (partial / foreign).mkdir() if foreign.endswith("/") else (partial / foreign).write_text("mine")
    before = listing(home)
    refused(model, home / "out", f"holds what no conversion wrote: {foreign.rstrip('/')}")
    assert listing(home) == before


def test_a_file_or_symlink_in_the_place_of_the_partial_directory_is_left_alone(model: Path, home: Path) -> None:
    partial = home / ".out.q6k-partial"
    partial.write_text("mine")
    refused(model, home / "out", "is in the way: it should be a directory")
    assert listing(home) == {partial.name: b"mine"}
    partial.unlink()
    (home / "theirs").mkdir()
    (home / "theirs" / "bundle.json").write_text("mine")
    partial.symlink_to("theirs")
    before = listing(home)
    refused(model, home / "out", "is in the way: it should be a directory")
    assert listing(home) == before


def test_a_bundle_that_another_run_finishes_meanwhile_is_not_replaced(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, locked = two_tensors(seed=3).write(home / "other.gguf"), locking.own

    def beaten(partial: Path, output: Path) -> tuple[Path, int]:
        monkeypatch.setattr(locking, "own", locked)
        convert(other, output)
        return locked(partial, output)

    monkeypatch.setattr(locking, "own", beaten)
    refused(model, home / "out", "is already a bundle", force=False)
    assert checked_manifest(home / "out")["sources"][0]["name"] == "other.gguf"
    assert sorted(p.name for p in home.iterdir()) == ["other.gguf", "out"]


# Replacing where directories cannot be exchanged in one step


def patch_renameat2(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """`renameat2` fails with `code`; None: the C library does not have it."""

    def renameat2(*_: object) -> int:
        ctypes.set_errno(code or 0)
        return -1

    library = SimpleNamespace() if code is None else SimpleNamespace(renameat2=renameat2)
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **more: library if name is None else real(name, **more))


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EINVAL])
def test_two_renames_replace_a_bundle_where_one_cannot(
    code: int | None, model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(two_tensors(rows=9, seed=9).write(home / "other.gguf"), home / "out")
    patch_renameat2(monkeypatch, code)
    convert(model, home / "out", force=True)
    assert checked_manifest(home / "out")["sources"][0]["name"] == "model.gguf"
    assert sorted(p.name for p in home.iterdir()) == ["other.gguf", "out"]


def test_an_exchange_that_fails_for_good_leaves_the_old_bundle(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(model, home / "out")
    before = listing(home)
    patch_renameat2(monkeypatch, errno.EACCES)
    with pytest.raises(OSError, match="Permission denied"):
        convert(two_tensors(seed=4).write(model), home / "out", force=True)
    assert listing(home) == before


def test_the_old_bundle_comes_back_if_the_second_rename_fails(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(model, home / "out")
    before, rename = listing(home), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith("q6k-partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    patch_renameat2(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        convert(two_tensors(seed=4).write(model), home / "out", force=True)
    assert listing(home) == before


# Free space


def test_free_space_is_checked_before_anything_is_written(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: (asked.append(place), SimpleNamespace(free=1234))[1])
    error = refused(
        model, home / "a" / "out", r"a/out: the bundle takes .* \(\d+ bytes\), but .*home has 1.23 kB free"
    )
    assert "Free some space" in error.remedy
    assert asked == [home]
    assert listing(home) == {}
    needed = int(str(error).split("(")[1].split()[0])
    monkeypatch.undo()
    convert(model, home / "out")
    # Never less than it takes; and a check that asks for much more would refuse disks that suffice.
    written = sum(p.stat().st_size for p in (home / "out").iterdir())
    assert written <= needed <= written + 3 * 2048
