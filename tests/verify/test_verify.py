"""Verification: what passes, and which stage finds wrong content or another source."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from broken_bundles import (
    QL,
    SHARD,
    edit_manifest,
    only_finding,
    resign,
    states,
    tensor_edit,
)
from gguf_builder import Builder, key_value, q6k_blocks, small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.verify.stages import verify
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle import structure


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
    edit_manifest(bundle, lambda content: content.update(version=3))
    found = only_finding(verify(bundle), "structure")
    assert found.file == "bundle.json"
    assert "this program reads version 2" in found.problem


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
    count = 16 if role == "scale" else 1
    assert found.problem == f"{count} of its numbers are NaN or infinite, the first at row 2, column 0"
    assert (found.tensor, found.array) == ("x", f"x.{role}")


def replace_metadata(directory: Path, content: bytes) -> None:
    (directory / "metadata.gguf").write_bytes(content)
    resign(directory, "metadata.gguf", len(content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Builder(kv=[key_value("general.architecture", "gemma3")]).build(), "is of architecture 'gemma3'"),
        (Builder(tensors=[weight("x", (1, 256))]).build(), "expected no tensors, found 1"),
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
