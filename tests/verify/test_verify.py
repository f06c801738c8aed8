"""Verification: every rule has a bundle that breaks it, made from a good one by one mutation."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_builder import Builder, key_value, q6k_blocks, small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.verify.stages import Verification, verify
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle import structure
from q6k_kernels.bundle.structure import Finding

SHARD = "model.safetensors"
QL = "token_embd.weight.ql"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out").output


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out", Options(max_shard_size=3000)).output


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alters the manifest and signs it again, as a careful forger would."""
    path = directory / "bundle.json"
    content = json.loads(path.read_bytes())
    del content["manifest_checksum"]
    change(content)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    content["manifest_checksum"] = manifests.checksum(text.encode())
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_header(directory: Path, change: Callable[[bytes], bytes], name: str = SHARD) -> None:
    """Replaces a shard's header text and makes the manifest's size and checksum of it right again."""
    path = directory / name
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    text = change(raw[8 : 8 + length])
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    path.write_bytes(header + raw[8 + length :])
    resign(directory, name, len(header))


def resign(directory: Path, name: str, checked: int) -> None:
    raw = (directory / name).read_bytes()
    entry = {"size": len(raw), "checked_bytes": checked, "checksum": manifests.checksum(raw[:checked])}
    edit_manifest(directory, lambda content: content["files"].update({name: entry}))


def edit_entries(directory: Path, change: Callable[[dict[str, Any]], object], name: str = SHARD) -> None:
    """Alters a shard's header as JSON."""

    def rewrite(text: bytes) -> bytes:
        content = json.loads(text)
        change(content)
        return json.dumps(content, separators=(",", ":")).encode()

    edit_header(directory, rewrite, name)


def tensor(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in content["tensors"] if t["name"] == name)


def only_finding(run: Verification, stage: str) -> Finding:
    assert run.failed
    assert [where for where, _ in run.findings] == [stage], run.findings
    return run.findings[0][1]


def states(run: Verification) -> dict[str, str]:
    return {stage.name: stage.state for stage in run.stages}


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("other", ["bf16", "raw", "skip"])
@pytest.mark.parametrize("shard", [3000, 10**9])
def test_a_good_bundle_passes(tmp_path: Path, scales: str, other: str, shard: int) -> None:
    source = small_model().write(tmp_path / "model.gguf")
    options = Options(scales=scales, other=other, max_shard_size=shard)  # type: ignore[arg-type]
    convert(source, tmp_path / "out", options)
    run = verify(tmp_path / "out", source=source)
    assert run.findings == []
    assert states(run) == {"structure": "passed", "content": "passed", "source": "passed", "device": "skipped"}


def test_fast_reads_no_array(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q6k_convert.verify.stages.check_content", lambda *a, **k: pytest.fail("content was read"))
    run = verify(bundle, fast=True)
    assert states(run) == {"structure": "passed", "content": "skipped", "source": "skipped", "device": "skipped"}
    assert not run.failed


def test_a_directory_that_is_no_bundle_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(manifests.BundleError, match="is not a bundle"):
        verify(tmp_path)


def test_an_unknown_version_names_the_known_ones(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content.update(version=2))
    found = only_finding(verify(bundle), "structure")
    assert found.file == "bundle.json"
    assert "this program reads version 1" in found.problem


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


def tensor_edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit_manifest(directory, lambda content: change(tensor(content, name)))


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
        "Q4_K of shape [5, 512] has no planar form",
        "token_embd.weight",
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


@pytest.mark.parametrize("key", [QL, "token_embd.weight.qh", "token_embd.weight.scale", "output_norm.weight"])
def test_a_flipped_bit_in_an_array_names_file_tensor_and_array(bundle: Path, key: str) -> None:
    at = structure.read_header(bundle / SHARD)[key].begin
    raw = bytearray((bundle / SHARD).read_bytes())
    raw[at] ^= 1
    (bundle / SHARD).write_bytes(raw)
    found = only_finding(verify(bundle), "content")
    assert (found.file, found.array) == (SHARD, key)
    assert found.tensor == key.removesuffix(".ql").removesuffix(".qh").removesuffix(".scale")
    assert "checksum is" in found.problem


def test_any_flipped_bit_of_any_file_is_found(sharded: Path) -> None:
    rng = random.Random(5)
    files = sorted(sharded.iterdir())
    assert len(files) > 4
    for path in files:
        good = path.read_bytes()
        bits = range(8 * len(good)) if len(good) < 40 else [rng.randrange(8 * len(good)) for _ in range(40)]
        for bit in bits:
            broken = bytearray(good)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            run = verify(sharded)
            assert run.failed, f"bit {bit} of {path.name}"
            assert path.name in {finding.file for _, finding in run.findings}
        path.write_bytes(good)
    assert not verify(sharded).failed


@pytest.mark.parametrize(("scales", "role", "bits"), [("bf16", "scale", 0x7F80), ("exact", "steps", 0x7E00)])
def test_scales_that_are_not_finite_are_found(tmp_path: Path, scales: str, role: str, bits: int) -> None:
    blocks = bytearray(q6k_blocks(6))
    blocks[4 * 210 + 208 : 4 * 210 + 210] = struct.pack("<H", bits & 0xFFFF if scales == "exact" else 0x7C00)
    blocks[4 * 210 + 192 : 4 * 210 + 208] = bytes([1] * 16)
    model = Builder(tensors=[weight("x", (3, 512))])
    model.tensors[0].data = bytes(blocks)
    source = model.write(tmp_path / "model.gguf")
    options = Options(scales=scales, allow_nonfinite=True)  # type: ignore[arg-type]
    convert(source, tmp_path / "out", options)
    assert not verify(tmp_path / "out", source=source).failed
    edit_manifest(tmp_path / "out", lambda content: content["options"].update(allow_nonfinite=False))
    found = only_finding(verify(tmp_path / "out"), "content")
    column = 0
    assert f"row 2, column {column} is NaN or infinite" in found.problem
    assert (found.tensor, found.array) == ("x", f"x.{role}")


def replace_metadata(directory: Path, content: bytes) -> None:
    (directory / "metadata.gguf").write_bytes(content)
    resign(directory, "metadata.gguf", len(content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Builder(kv=[key_value("general.architecture", "gemma3")]).build(), "is of architecture 'gemma3'"),
        (Builder(tensors=[weight("x", (1, 256))]).build(), "holds 1 tensors, expected none"),
        (b"GGUF", "24 bytes expected"),
    ],
)
def test_metadata_that_does_not_match_is_found(bundle: Path, content: bytes, words: str) -> None:
    replace_metadata(bundle, content)
    found = only_finding(verify(bundle), "content")
    assert found.file == "metadata.gguf"
    assert words in found.problem


def test_exact_scales_are_exact_and_bf16_scales_are_measured(tmp_path: Path) -> None:
    source = small_model().write(tmp_path / "model.gguf")
    convert(source, tmp_path / "exact", Options(scales="exact", other="raw"))
    convert(source, tmp_path / "bf16", Options(other="raw"))
    exact = verify(tmp_path / "exact", source=source).source
    rounded = verify(tmp_path / "bf16", source=source).source
    assert exact is not None
    assert rounded is not None
    assert exact.total.exact
    assert exact.total.max_scale_error == 0
    assert not rounded.total.exact
    assert rounded.total.equal
    assert rounded.total.snr_db is not None
    assert 50 < rounded.total.snr_db < 65
    assert rounded.total.max_scale_error is not None
    assert 0 < rounded.total.max_scale_error <= 2.0**-8


def test_the_reported_noise_is_that_of_the_dequantised_weights(tmp_path: Path) -> None:
    """SNR from the gguf package's weights and this test's own arithmetic on the stored arrays."""
    import gguf

    import oracles

    blocks = q6k_blocks(4, seed=9)
    model = Builder(tensors=[weight("x", (2, 512))])
    model.tensors[0].data = blocks
    source = model.write(tmp_path / "model.gguf")
    convert(source, tmp_path / "out")
    truth = gguf.dequantize(np.frombuffer(blocks, np.uint8).reshape(1, -1), gguf.GGMLQuantizationType.Q6_K)[0]
    noise = 0.0
    for index in range(4):
        q, scales = oracles.q6k_block(blocks[210 * index : 210 * index + 210])
        for at, weight_q in enumerate(q):
            kept = struct.unpack("<f", struct.pack("<I", oracles.bf16(scales[at // 16]) << 16))[0]
            noise += (kept * weight_q - float(truth[256 * index + at])) ** 2
    report = verify(tmp_path / "out", source=source).source
    assert report is not None
    expected = 10 * np.log10(float(np.square(truth.astype(np.float64)).sum()) / noise)
    assert report.total.snr_db == pytest.approx(expected, rel=1e-9)


def test_a_bundle_whose_planes_are_wrong_but_signed_is_found_by_its_source(bundle: Path) -> None:
    entry = structure.read_header(bundle / SHARD)["blk.0.attn_q.weight.qh"]
    raw = bytearray((bundle / SHARD).read_bytes())
    raw[entry.begin + 70] ^= 0x10
    (bundle / SHARD).write_bytes(raw)
    right = manifests.checksum(bytes(raw[entry.begin : entry.end]))
    tensor_edit("blk.0.attn_q.weight", lambda t: t["arrays"]["qh"].update(checksum=right))(bundle)
    assert not verify(bundle).failed
    found = only_finding(verify(bundle, source=bundle.parent / "model.gguf"), "source")
    assert (found.file, found.tensor, found.array) == (SHARD, "blk.0.attn_q.weight", "blk.0.attn_q.weight.qh")
    assert "differs from the source at byte 70" in found.problem


def other_model(change: Callable[[Builder], object]) -> bytes:
    model = small_model()
    change(model)
    return model.build()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (other_model(lambda m: m.tensors.pop()), "the source has 6 tensors, the bundle lists 7"),
        (
            other_model(lambda m: m.tensors.__setitem__(2, weight("blk.0.attn_x.weight", (3, 256)))),
            "'blk.0.attn_x.weight' Q6_K [3, 256] in its place",
        ),
        (
            other_model(lambda m: m.kv.__setitem__(0, key_value("general.architecture", "gemma"))),
            "the source is of architecture 'gemma', the bundle of 'llama'",
        ),
        (
            other_model(lambda m: m.kv.__setitem__(1, key_value("llama.block_count", 2))),
            "in key 'llama.block_count'",
        ),
        (
            other_model(lambda m: m.tensors.__setitem__(1, weight("output_norm.weight", (512,), 0, seed=99))),
            "the bundle was made from model.gguf",
        ),
        (small_model().build() + b"\0", "the bundle was made from model.gguf"),
    ],
)
def test_a_bundle_of_another_source_is_found_with_the_first_difference(
    bundle: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "other.gguf").write_bytes(content)
    run = verify(bundle, source=tmp_path / "other.gguf")
    assert run.failed
    assert states(run)["source"] == "failed"
    assert words in run.findings[0][1].problem


def test_a_renamed_or_split_source_is_still_the_source(bundle: Path) -> None:
    shutil.move(bundle.parent / "model.gguf", bundle.parent / "renamed.gguf")
    assert not verify(bundle, source=bundle.parent / "renamed.gguf").failed


def test_an_array_that_shrinks_while_it_is_read_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: 0 if at > 4000 else real(fd, buffers, at))
    with pytest.raises(OSError, match="while it was being read"):
        verify(bundle)
