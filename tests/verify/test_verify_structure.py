"""Verification's first stage: every rule has a bundle that breaks it, made from a good one by one mutation."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broken_bundles import (
    QL,
    SHARD,
    edit_entries,
    edit_header,
    edit_manifest,
    only_finding,
    resign,
    states,
    tensor,
    tensor_edit,
)
from q6k_convert.verify.stages import verify
from q6k_kernels.bundle import structure
from q6k_kernels.formats.types import WEIGHT_TYPES


def raw_entry(text: str) -> Callable[[Path], None]:
    """A shard whose header begins with the given JSON text in place of its first array."""
    return lambda directory: edit_header(directory, lambda _: text.encode())


def cut_last_byte(directory: Path) -> None:
    raw = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes(raw[:-1])


def trailing_bytes(directory: Path) -> None:
    with (directory / SHARD).open("ab") as file:
        file.write(b"xxxxxxxx")
    checked = json.loads((directory / "bundle.json").read_bytes())["files"][SHARD]["checked_bytes"]
    resign(directory, SHARD, checked)


def header_length(length: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        raw = bytearray((directory / SHARD).read_bytes())
        raw[:8] = struct.pack("<Q", length)
        (directory / SHARD).write_bytes(raw)
        resign(directory, SHARD, 8)

    return change


def entry(**fields: object) -> Callable[[Path], None]:
    """One array of the header altered."""
    return lambda directory: edit_entries(directory, lambda content: content[QL].update(fields))


def shifted(key: str, by: int) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        content[key]["data_offsets"] = [offset + by for offset in content[key]["data_offsets"]]

    return lambda directory: edit_entries(directory, change)


def duplicate_key(text: bytes) -> bytes:
    return text.rstrip()[:-1] + b',"token_embd.weight.qh":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'


def link_out(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        outside = directory.parent / "elsewhere"
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)

    return change


def rename_key(content: dict[str, Any]) -> None:
    content["token_embd.weight.qx"] = content.pop(QL)


STRUCTURE: dict[str, tuple[Callable[[Path], object], str, str | None, str | None]] = {
    # mutation, words of the problem, tensor, array (a finding on bundle.json names the role)
    "shard missing": (lambda d: (d / SHARD).unlink(), "missing", None, None),
    "metadata missing": (lambda d: (d / "metadata.gguf").unlink(), "missing", None, None),
    "shard cut short": (cut_last_byte, "bytes, expected", None, None),
    "shard is a directory": (
        lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()),
        "not a regular file",
        None,
        None,
    ),
    "shard links out": (link_out(SHARD), "is a link out of the directory", None, None),
    "manifest links out": (link_out("bundle.json"), "is a link out of the directory", None, None),
    "metadata links out": (link_out("metadata.gguf"), "is a link out of the directory", None, None),
    "stray shard": (
        lambda d: (d / "other.safetensors").write_bytes(b""),
        "lies in the directory, but is not in the manifest",
        None,
        None,
    ),
    "path that leaves": (
        lambda d: edit_manifest(d, lambda c: c["files"].update({"../x.safetensors": c["files"][SHARD]})),
        "'../x.safetensors' is not the name of a file in this directory",
        None,
        None,
    ),
    "trailing bytes": (trailing_bytes, "the arrays end at byte", None, None),
    "header past the end": (header_length(1 << 40), "header of 1099511627776 bytes; the file has", None, None),
    "header length near 2^64": (header_length((1 << 64) - 1), "header of 18446744073709551615 bytes", None, None),
    "header not JSON": (raw_entry("{]"), "the header is not valid JSON", None, None),
    "header not an object": (raw_entry("[1]"), "does not begin with '{'", None, None),
    "header nested deep": (raw_entry('{"a":' + "[" * 100_000), "the header is not valid JSON", None, None),
    "duplicate key": (
        lambda d: edit_header(d, duplicate_key),
        "key 'token_embd.weight.qh' appears twice",
        None,
        None,
    ),
    "metadata not strings": (
        lambda d: edit_entries(d, lambda c: c.update(__metadata__={"format": 1})),
        "__metadata__ is not a map of strings",
        None,
        None,
    ),
    "entry with a field too many": (entry(extra=1), "expected dtype, shape and data_offsets", None, None),
    "entry of unknown dtype": (entry(dtype="F8_E4M3"), "unknown dtype 'F8_E4M3'", None, None),
    "entry of negative shape": (entry(shape=[-5, 256]), "impossible shape [-5, 256]", None, None),
    "entry of huge shape": (
        entry(shape=[1 << 62, 1 << 62]),
        "takes 21267647932558653966460912964485513216",
        None,
        None,
    ),
    "entry of fractional shape": (entry(shape=[5.0, 256]), "impossible shape", None, None),
    "entry of wrong size": (entry(shape=[5, 255]), "takes 1275 bytes, data_offsets give 1280", None, None),
    "offsets backwards": (entry(data_offsets=[2560, 1280]), "data_offsets give -1280", None, None),
    "overlap": (shifted("token_embd.weight.qh", -8), "overlaps the array before it", None, None),
    "hole": (shifted("blk.0.attn_q.weight.qh", 8), "a hole before it", None, None),
    "array renamed": (
        lambda d: edit_entries(d, rename_key),
        "is not in the shard",
        "token_embd.weight",
        QL,
    ),
    "shape disagrees": (
        entry(shape=[10, 128]),
        "expected U8 [5, 256], found U8 [10, 128]",
        "token_embd.weight",
        QL,
    ),
    "dtype disagrees": (entry(dtype="I8"), "expected U8 [5, 256], found I8 [5, 256]", "token_embd.weight", QL),
    "planes disagree on K": (
        tensor_edit("token_embd.weight", lambda t: t["arrays"]["qh"].update(shape=[10, 64])),
        "expected token_embd.weight.qh U8 [5, 128], found token_embd.weight.qh U8 [10, 64]",
        "token_embd.weight",
        "qh",
    ),
    "tensor and planes disagree": (
        tensor_edit("token_embd.weight", lambda t: t.update(shape=[5, 256])),
        "expected token_embd.weight.ql U8 [5, 128]",
        "token_embd.weight",
        "ql",
    ),
    "plane missing": (
        tensor_edit("token_embd.weight", lambda t: t["arrays"].pop("qh")),
        "stored planar: expected arrays qh, ql, scale, found ql, scale",
        "token_embd.weight",
        None,
    ),
    "planar of another type": (
        tensor_edit("token_embd.weight", lambda t: t.update(type="Q4_K")),
        "Q4_K of shape [5, 512] cannot be stored as q6_k",
        "token_embd.weight",
        None,
    ),
    "format that the scales do not choose": (
        tensor_edit("token_embd.weight", lambda t: t.update(format="q6_k_exact")),
        "option scales bf16 gives Q6_K as q6_k, found q6_k_exact",
        "token_embd.weight",
        None,
    ),
    "format unknown": (
        tensor_edit("token_embd.weight", lambda t: t.update(format="q7_k")),
        f"format: expected one of {', '.join(WEIGHT_TYPES)}, found 'q7_k'",
        "token_embd.weight",
        None,
    ),
    "format null": (
        tensor_edit("token_embd.weight", lambda t: t.update(format=None)),
        "stored planar, and a weight type None: planar tensors have one, others have none",
        "token_embd.weight",
        None,
    ),
    "format of a dense tensor": (
        tensor_edit("output_norm.weight", lambda t: t.update(format="q6_k")),
        "stored plain, and a weight type 'q6_k': planar tensors have one, others have none",
        "output_norm.weight",
        None,
    ),
    "listed twice": (
        lambda d: edit_manifest(d, lambda c: c["tensors"].append(tensor(c, "output_norm.weight"))),
        "is listed twice",
        "output_norm.weight",
        None,
    ),
    "no such shard": (
        tensor_edit("output_norm.weight", lambda t: t["arrays"]["data"].update(file="/etc/passwd")),
        "lies in '/etc/passwd', which is no shard of this bundle",
        "output_norm.weight",
        "data",
    ),
    "tied to nothing": (
        lambda d: edit_manifest(d, lambda c: c.update(tied={"output.weight": "nothing"})),
        "'output.weight' cannot be tied to 'nothing'",
        None,
        None,
    ),
    "scales of no kind": (
        lambda d: edit_manifest(d, lambda c: c["options"].update(scales="fp8")),
        "option scales is 'fp8', expected bf16 or exact",
        None,
        None,
    ),
    "metadata only partly checked": (
        lambda d: resign(d, "metadata.gguf", 8),
        "the manifest checks only 8 of its",
        None,
        None,
    ),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_a_broken_structure_is_found_and_named(bundle: Path, case: str) -> None:
    mutate, words, tensor_name, array = STRUCTURE[case]
    mutate(bundle)
    run = verify(bundle)
    found = [finding for stage, finding in run.findings if stage == "structure" and words in finding.problem]
    assert found, run.findings
    assert found[0].tensor == tensor_name
    assert found[0].array == array
    assert found[0].file is not None
    assert run.failed
    assert states(run).get("content", "skipped") == "skipped"


def test_a_header_over_the_limit_is_not_parsed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "MAX_HEADER", 64)
    assert "the limit is 64" in only_finding(verify(bundle), "structure").problem


def test_a_misaligned_array_is_found(tmp_path: Path) -> None:
    """Laid out by hand: one byte, then a float, which safetensors allows and the format does not."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(5))
    with pytest.raises(ValueError, match="'b' at byte .* is not aligned to its dtype F32"):
        structure.read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["weight_map"].update({QL: "model-00002-of-00004.safetensors"}), "the manifest 'model-00001"),
        (lambda c: c["weight_map"].pop(QL), "says nothing, the manifest"),
        (lambda c: c.pop("weight_map"), "is not an index"),
        (lambda c: c.update(weight_map=[]), "is no map"),
    ],
)
def test_an_index_that_disagrees_is_found(sharded: Path, change: Callable[[Any], object], words: str) -> None:
    path = sharded / "model.safetensors.index.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    resign(sharded, path.name, path.stat().st_size)
    found = only_finding(verify(sharded), "structure")
    assert words in found.problem
    assert found.file == path.name
