"""Putting a bundle in place: what appeared or changed there meanwhile is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle_helpers import Listing, below, failed, invoke, listing, two_tensors
from placed import meanwhile, other_bundle
from q6k_convert.convert import placing
from q6k_convert.convert.pipeline import convert
from q6k_convert.errors import IOFailedError

Change = Callable[[Path], object]
Patch = pytest.MonkeyPatch


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return two_tensors().write(tmp_path / "model.gguf")


# Data of others


def _theirs(out: Path) -> None:
    """A directory of another program, whose files are named as those of bundles are."""
    out.mkdir(exist_ok=True)
    for name in ("model.safetensors", "bundle.json", "metadata.gguf"):
        (out / name).write_text("mine")


def _linked(out: Path) -> None:
    _theirs(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")


APPEARS: dict[str, Change] = {
    "a directory": _theirs,
    "a file": lambda out: out.write_text("mine"),
    "a link to a directory": _linked,
    "a dangling link": lambda out: out.symlink_to("nowhere"),
    "a bundle": other_bundle,
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", APPEARS)
def test_what_appears_at_the_output_is_kept(
    what: str, force: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    appeared = list[Listing]()

    def appear() -> None:
        monkeypatch.undo()
        APPEARS[what](home / "out")
        appeared.append({name: content for name, content in listing(home).items() if ".q6k-partial" not in name})

    meanwhile(monkeypatch, appear)
    with pytest.raises(
        IOFailedError, match="put there, or changed, while the bundle was made; it is left as it is"
    ):
        convert(model, home / "out", force=force)
    assert [listing(home)] == appeared


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_an_empty_directory_that_is_filled_meanwhile_is_kept(
    force: bool, inside: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    if inside:
        monkeypatch.setattr(placing, "is_fixed", Path.is_dir)
    (home / "out").mkdir()
    meanwhile(monkeypatch, lambda: _theirs(home / "out"))
    with pytest.raises(IOFailedError, match="put there, or changed, while the bundle was made"):
        convert(model, home / "out", force=force)
    assert set(listing(home / "out").values()) == {b"mine"}
    assert [path.name for path in home.iterdir()] == ["out"]


def test_an_empty_directory_that_appears_is_used(model: Path, home: Path, new: Listing, monkeypatch: Patch) -> None:
    meanwhile(monkeypatch, (home / "out").mkdir)
    convert(model, home / "out")
    assert listing(home) == below("out", new)


def _overwritten(out: Path) -> None:
    (out / "metadata.gguf").write_text("mine")


def _touched(out: Path) -> None:
    os.utime(out / "metadata.gguf", (1, 1))


def _exchanged(out: Path) -> None:
    out.rename(out.with_name("moved"))
    _theirs(out)


def _moved_and_linked(out: Path) -> None:
    out.rename(out.with_name("moved"))
    out.symlink_to("moved")


CHANGES: dict[str, Change] = {
    "a file is added": lambda out: (out / "notes.txt").write_text("mine"),
    "a directory is added": lambda out: (out / "sub").mkdir(),
    "a shard is added": lambda out: (out / "model.safetensors").write_text("mine"),
    "a file is removed": lambda out: (out / "metadata.gguf").unlink(),
    "a file is overwritten": _overwritten,
    "a file is touched": _touched,
    "a file becomes a link": lambda out: (
        (out / "metadata.gguf").rename(out.with_name("m")),
        (out / "metadata.gguf").symlink_to("../m"),
    ),
    "the directory is another": _exchanged,
    "the directory is moved and linked": _moved_and_linked,
}
WAYS: dict[str, dict[str, Callable[..., object]]] = {
    "exchange": {},
    "two renames": {"_renameat2": lambda *_: False},
    "inside": {"is_fixed": Path.is_dir},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["while it works", "after the last check"])
def test_a_bundle_that_changes_meanwhile_is_not_replaced(
    what: str, way: str, late: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    if way == "inside" and (late or what in ("the directory is another", "the directory is moved and linked")):
        pytest.skip("a mount point is not moved, and right after the check files are removed by their names")
    other_bundle(home / "out")
    for name, patch in WAYS[way].items():
        monkeypatch.setattr(placing, name, patch)
    changed = list[Listing]()

    def change() -> None:
        CHANGES[what](home / "out")
        changed.append({name: content for name, content in listing(home).items() if ".q6k-partial" not in name})

    if late:
        lock = placing.lock
        monkeypatch.setattr(placing, "lock", lambda *paths: (lock(*paths), change())[0])
    else:
        meanwhile(monkeypatch, change)
    with pytest.raises(IOFailedError, match="it is left as it is"):
        convert(model, home / "out", force=True)
    assert [listing(home)] == changed


def test_what_is_put_into_the_old_bundle_at_last_is_kept_and_named(
    model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    other_bundle(home / "out")
    real = placing._exchange

    def exchange(partial: Path, *more: Any) -> Path:
        old = real(partial, *more)
        (old / "model-00007-of-00007.safetensors").write_text("mine")
        return old

    monkeypatch.setattr(placing, "_exchange", exchange)
    with pytest.raises(IOFailedError, match="kept in .*model-00007-of-00007.safetensors") as caught:
        convert(model, home / "out", force=True)
    assert "Move it out" in caught.value.remedy
    kept = below(".out.q6k-partial", {"model-00007-of-00007.safetensors": b"mine"})
    assert listing(home) == below("out", new) | kept


def test_what_a_killed_exchange_left_is_not_removed_beyond_its_manifest(model: Path, home: Path) -> None:
    other_bundle(home / ".out.q6k-partial")
    (home / ".out.q6k-partial" / "model.safetensors").write_text("mine")
    before = listing(home)
    with pytest.raises(IOFailedError, match="holds what no conversion wrote: model.safetensors"):
        convert(model, home / "out")
    assert listing(home) == before


def test_a_file_that_appears_while_files_are_moved_is_kept_and_the_next_run_ends_the_work(
    model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(placing, "is_fixed", Path.is_dir)
    (home / "out").mkdir()
    monkeypatch.setattr(placing, "_check_same", lambda *_: (home / "out" / "model.safetensors").write_text("mine"))
    with pytest.raises(IOFailedError, match="out/model.safetensors appeared while the bundle was put there"):
        convert(model, home / "out")
    assert (home / "out" / "model.safetensors").read_text() == "mine"
    (home / "out" / "model.safetensors").rename(home / "theirs")
    # The work is ended before the new run looks at what is there.
    failed(invoke(model, home / "out"), 4, "is already a bundle", "Use --force")
    assert listing(home) == below("out", new) | {"theirs": b"mine"}
