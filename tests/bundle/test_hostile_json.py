"""JSON that costs much more memory as Python's objects than as text, and texts that nobody could read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.manifest import BundleError, Manifest
from q6k_kernels.bundle.parsing import parse

MOST = 400_000
HOSTILE = {
    "lists": (b"[" + b"[]," * MOST)[:MOST] + b"[]]",
    "numbers": (b"[" + b"1," * MOST)[: MOST + 1] + b"1]",
    "texts": b"[" + b'"a",' * MOST + b"1]",
    "objects": b"[" + b'{"a":1},' * (MOST // 3) + b"1]",
    "escapes": b"[" + b'"' + rb"\"\\" * MOST + b'",' + b"1," * MOST + b"1]",
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_many_small_values_are_counted_before_they_are_made(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q6k_kernels.bundle.parsing.MAX_TOKENS", 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 100000 texts, commas and opening brackets"):
            parse(raw)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_commas_and_brackets_in_texts_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q6k_kernels.bundle.parsing.MAX_TOKENS", 6)
    assert parse(rb'["a,,,[[{\"]", ",[", 3]') == ['a,,,[[{"]', ",[", 3]
    with pytest.raises(ValueError, match="more than 6 texts"):
        parse(rb'["a,,,[[{\"]", ",[", 3, 4, 5]')


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(b"[" * 100_000)


def written(directory: Path, **fields: object) -> Path:
    """A manifest with these fields and a right checksum."""
    content = json.loads(manifests.serialize(Manifest("p", {}, "llama", [], {}, {}, [])))
    content |= fields
    del content["manifest_checksum"]
    bare = json.dumps(content, indent=1, ensure_ascii=False)
    content["manifest_checksum"] = manifests.checksum(bare.encode())
    (directory / "bundle.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return directory


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("architecture", "x" * 5000, "architecture: a text of 5000 characters, more than the limit of 4096"),
        ("files", {"x" * 5000: {}}, "files: a text of 5000 characters"),
        ("tied", {"x": "y" * 5000}, "tied: a text of 5000 characters"),
        ("tied", {str(i): "y" for i in range(16_385)}, "tied: 16385, more than the limit of 16384"),
        ("sources", [0] * 100_000, "sources: 100000, more than the limit of 99999"),
        ("files", {str(i): 0 for i in range(100_002)}, "files: 100002, more than the limit of 100001"),
        ("architecture", ["llama"] * 100_000, "architecture: expected str, found list"),
        ("version", ["x" * 5000] * 100, "version \\['xxx"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_texts_and_lists_of_a_manifest_are_bounded(tmp_path: Path, name: str, value: object, problem: str) -> None:
    with pytest.raises(BundleError, match=problem) as caught:
        manifests.read(written(tmp_path, **{name: value}))
    assert len(str(caught.value)) < 1000
