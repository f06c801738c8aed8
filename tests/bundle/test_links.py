"""Bundles as the Hub's cache holds them, of links to its contents; and links that lead anywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle_helpers import invoke, two_tensors
from q6k_convert.convert.pipeline import convert
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.links import outside
from q6k_kernels.bundle.structure import check_structure

COMMIT = "0123456789" * 4


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A bundle in a subdirectory of a repository, as the cache holds it."""
    convert(two_tensors().write(tmp_path / "model.gguf"), tmp_path / "made")
    repository = tmp_path / "hub" / "models--org--name"
    place = repository / "snapshots" / COMMIT / "sub"
    place.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in (tmp_path / "made").iterdir():
        hashed = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(repository / "blobs" / hashed)
        (place / path.name).symlink_to(f"../../../blobs/{hashed}")
    return place


def findings(directory: Path) -> list[str]:
    return [str(finding) for finding in check_structure(directory, manifests.read(directory))]


def test_a_bundle_of_the_cache_is_sound(snapshot: Path, tmp_path: Path) -> None:
    assert findings(snapshot) == []
    (tmp_path / "link").symlink_to(snapshot)
    assert findings(tmp_path / "link") == []
    result = invoke("verify", snapshot, "--source", tmp_path / "model.gguf")
    assert result.exit_code == 0, result.output
    assert invoke("inspect", snapshot).exit_code == 0


def _to(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        place = path.parent / target
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        path.unlink()
        path.symlink_to(target)

    return change


@pytest.mark.parametrize(
    "target",
    [
        "../../../elsewhere", "../metadata.gguf", "../../../blobs/metadata", "../../../blobs/sub/" + "a" * 64,
        "../../../../models--org--other/blobs/" + "a" * 64, "../../../../blobs/" + "a" * 40,
    ],
)  # fmt: skip
def test_a_link_to_anywhere_else_is_refused(target: str, snapshot: Path) -> None:
    _to(target)(snapshot / "metadata.gguf")
    (finding,) = findings(snapshot)
    assert finding.startswith("metadata.gguf: is a link out of the directory, to /")


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        (f"models--o--n/snapshots/{COMMIT}", True),
        (f"models--o--n/snapshots/{COMMIT}/a/b", True),
        (f"datasets--o--n/snapshots/{COMMIT}", False),
        ("models--o--n/snapshots/main", False),
        (f"models--o--n/other/{COMMIT}", False),
        (f"models--o--n/{COMMIT}", False),
    ],
)
def test_the_layout_is_that_of_the_cache(place: str, allowed: bool, tmp_path: Path) -> None:
    blob = tmp_path / place.split("/")[0] / "blobs" / ("b" * 40)
    blob.parent.mkdir(parents=True)
    blob.touch()
    link = tmp_path / place / "bundle.json"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert (outside(link) is None) == allowed


def test_a_link_inside_the_directory_and_a_circle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert outside(tmp_path / "link") is None
    (tmp_path / "circle").symlink_to("circle")
    outside(tmp_path / "circle")
