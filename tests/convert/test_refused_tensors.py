"""Tensors that a sound GGUF may have and a conversion refuses: names that clash, scales that are no numbers."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import ggml_blocks
from gguf_builder import F32, Q6_K, Builder, Tensor, key_value, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options, make_plan
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.formats.ggml import GGMLType
from q6k_kernels.gguf.model import open_gguf

# Rejected at planning: two arrays of one name


@pytest.mark.parametrize("order", [1, -1], ids=["weight-first", "other-first"])
@pytest.mark.parametrize("role", ["ql", "qh", "scale"])
def test_two_arrays_of_one_name_are_rejected_before_anything_is_written(
    tmp_path: Path, role: str, order: int
) -> None:
    tensors = [weight("x", (2, 256)), weight(f"x.{role}", (8,), F32)][::order]
    path = Builder(tensors=tensors).write(tmp_path / "model.gguf")
    with open_gguf(path) as model, pytest.raises(GgufRejectedError) as caught:
        make_plan(model, Options())
    first, second = (t.name for t in tensors)
    second_record = {t.name: t.field.offset for t in gguf.GGUFReader(path).tensors}[str(second)]
    assert caught.value.cause == (
        f"{path}: tensor {second!r} at byte {second_record}: its array 'x.{role}' would have the name of one of "
        f"tensor {first!r}"
    )
    with pytest.raises(GgufRejectedError):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
    stored_tensors = convert(path, tmp_path / "out", Options(exclude=("x.*",))).manifest.tensors
    assert {t.name: t.storage for t in stored_tensors} == {"x": "planar", f"x.{role}": "skipped"}


def test_steps_clash_only_where_steps_are_stored(tmp_path: Path) -> None:
    path = Builder(tensors=[weight("x", (2, 256)), weight("x.steps", (8,), F32)]).write(tmp_path / "model.gguf")
    with open_gguf(path) as model:
        assert len(make_plan(model, Options(scales="bf16")).tensors) == 2
        with pytest.raises(GgufRejectedError, match=re.escape("array 'x.steps'")):
            make_plan(model, Options(scales="exact"))


def test_two_weights_can_clash_too(tmp_path: Path) -> None:
    # A 1-D Q6_K tensor is dequantised, so its one array has the tensor's own name.
    path = Builder(tensors=[weight("x", (2, 256)), weight("x.scale", (256,))]).write(tmp_path / "model.gguf")
    with open_gguf(path) as model, pytest.raises(GgufRejectedError, match=re.escape("array 'x.scale'")):
        make_plan(model, Options())


# Rejected while streaming: scales that are no numbers

NOT_FINITE = {"inf": 0x7C00, "minus-inf": 0xFC00, "nan": 0x7E00, "signalling-nan": 0x7C01, "minus-nan": 0xFFFF}


def with_d(tensor: Tensor, block: int, bits: int) -> Tensor:
    """The tensor with these bits as the scale of one Q6_K block."""
    data = bytearray(tensor.data)
    struct.pack_into("<H", data, block * 210 + 208, bits)
    return replace(tensor, data=bytes(data))


def stored(directory: Path, key: str) -> bytes:
    """The bytes of one array of a bundle of one shard, by the text of the safetensors format."""
    raw = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    begin, end = json.loads(raw[8 : 8 + length])[key]["data_offsets"]
    return raw[8 + length + begin : 8 + length + end]


@pytest.mark.parametrize("bits", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_a_scale_that_is_not_finite_is_rejected_with_its_place_and_leaves_nothing(
    tmp_path: Path, scales: Any, bits: int
) -> None:
    bad = with_d(weight("blk.0.w", (5, 768), seed=1), 7, bits)
    path = Builder(tensors=[weight("first", (2, 256)), bad]).write(tmp_path / "model.gguf")
    starts = {t.name: t.data_offset for t in gguf.GGUFReader(path).tensors}
    with pytest.raises(GgufRejectedError) as caught:
        convert(path, tmp_path / "out", Options(scales=scales))
    assert caught.value.cause == (
        f"{path}: tensor 'blk.0.w' at byte {starts['blk.0.w'] + 7 * 210 + 208}: block 7 (row 2, block 1 of it) "
        "has a scale d that is NaN or infinite"
    )
    assert path.read_bytes()[caught.value.offset :][:2] == struct.pack("<H", bits)
    assert "--allow-nonfinite" in caught.value.remedy
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ggml", sorted(ggml_blocks.HALVES))
@pytest.mark.parametrize("rank", [1, 2])
def test_a_number_that_is_not_finite_is_refused_in_every_type(tmp_path: Path, ggml: str, rank: int) -> None:
    """Packed, dequantised or kept raw."""
    block, size = ggml_blocks.ALL_SIZES[ggml]
    other = "raw" if ggml in ("Q8_1", "Q1_0", "Q2_0") else "bf16"
    for name, at in ggml_blocks.HALVES[ggml].items():
        blocks = ggml_blocks.random_blocks(ggml, 15)
        blocks[13, at : at + 2] = [0x01, 0xFC]
        shape = (5, 3 * block) if rank == 2 else (15 * block,)
        bad = Tensor("bad", shape, int(GGMLType[ggml]), blocks.tobytes())
        path = Builder(tensors=[weight("first", (2, 256)), bad]).write(tmp_path / "model.gguf")
        start = path.read_bytes().index(bad.data)
        place = "(row 4, block 1 of it)" if rank == 2 else "(row 0, block 13 of it)"
        for choice in {other, "raw"}:
            with pytest.raises(GgufRejectedError) as caught:
                convert(path, tmp_path / "out", Options(other=choice))  # type: ignore[arg-type]
            where = f"tensor 'bad' at byte {start + 13 * size + at}: block 13 {place}"
            assert caught.value.cause == f"{path}: {where} has a scale {name} that is NaN or infinite"
            assert list(tmp_path.iterdir()) == [path]
        kept = convert(path, tmp_path / "kept", Options(other=other, allow_nonfinite=True))  # type: ignore[arg-type]
        assert kept.manifest.tensors[1].storage != "skipped"
        shutil.rmtree(tmp_path / "kept")


@pytest.mark.parametrize(("ggml", "name", "at"), [("MXFP4", "e", 0), ("NVFP4", "d[3]", 3), ("Q8_K", "d", 0)])
def test_a_nan_in_eight_bits_or_in_fp32_is_refused_too(tmp_path: Path, ggml: str, name: str, at: int) -> None:
    block, size = ggml_blocks.SIZES[ggml]
    blocks = ggml_blocks.random_blocks(ggml, 4)
    blocks[2, at : at + (4 if ggml == "Q8_K" else 1)] = 0x7F if ggml == "NVFP4" else 0xFF
    bad = Tensor("bad", (2, 2 * block), int(gguf.GGMLQuantizationType[ggml]), blocks.tobytes())
    path = Builder(tensors=[weight("first", (2, 256)), bad]).write(tmp_path / "model.gguf")
    with pytest.raises(GgufRejectedError) as caught:
        convert(path, tmp_path / "out", Options(other="raw"))
    assert caught.value.offset == path.read_bytes().index(bad.data) + 2 * size + at
    assert f"block 2 (row 1, block 0 of it) has a scale {name} that" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "block", "row", "column"),
    [
        pytest.param((4, 512), 0, 0, 0, id="first-block"),
        pytest.param((4, 512), 7, 3, 1, id="last-block"),
        pytest.param((3, 2, 512), 9, 4, 1, id="third-expert"),
        pytest.param((40, 512 * 256), 20_000, 39, 32, id="a-later-piece"),
    ],
)
def test_the_place_of_a_bad_scale_is_counted_through_the_whole_tensor(
    tmp_path: Path, shape: tuple[int, ...], block: int, row: int, column: int
) -> None:
    path = Builder(tensors=[with_d(weight("w", shape), block, 0x7E00)]).write(tmp_path / "model.gguf")
    (tensor,) = gguf.GGUFReader(path).tensors
    for jobs in (1, 4):
        with pytest.raises(GgufRejectedError) as caught:
            convert(path, tmp_path / "out", jobs=jobs)
        assert f"block {block} (row {row}, block {column} of it)" in str(caught.value)
        assert caught.value.offset == tensor.data_offset + block * 210 + 208
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("jobs", [1, 8])
def test_the_first_of_several_bad_scales_is_the_one_reported(tmp_path: Path, jobs: int) -> None:
    bad = weight("w", (70, 256 * 512))
    for block in (35_000, 20_001, 35_001, 20_000):
        bad = with_d(bad, block, 0xFC00)
    path = Builder(tensors=[bad]).write(tmp_path / "model.gguf")
    for _ in range(3):
        with pytest.raises(GgufRejectedError, match="block 20000 "):
            convert(path, tmp_path / "out", jobs=jobs)


def test_a_bad_scale_in_a_part_names_the_part(tmp_path: Path) -> None:
    paths = []
    for number, tensor in enumerate([weight("good", (2, 256)), with_d(weight("bad", (2, 256)), 1, 0x7C00)]):
        keys = [key_value("split.no", number, "u16"), key_value("split.count", 2, "u16")]
        part = Builder(tensors=[tensor], kv=[*keys, key_value("split.tensors.count", 2, "i32")])
        paths.append(part.write(tmp_path / f"model-{number + 1:05}-of-00002.gguf"))
    with pytest.raises(GgufRejectedError, match=re.escape(f"{paths[1]}: tensor 'bad' at byte ")):
        convert(paths[0], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == paths


def test_a_bad_scale_in_a_tensor_left_out_is_no_harm(tmp_path: Path) -> None:
    tensors = [weight("good", (2, 256)), with_d(weight("bad", (2, 256)), 1, 0x7E00)]
    path = Builder(tensors=tensors).write(tmp_path / "model.gguf")
    result = convert(path, tmp_path / "out", Options(exclude=("bad",)))
    assert [t.storage for t in result.manifest.tensors] == ["planar", "skipped"]


@pytest.mark.parametrize("bits", NOT_FINITE.values(), ids=NOT_FINITE)
def test_allow_nonfinite_keeps_the_scale_as_it_is(tmp_path: Path, bits: int) -> None:
    tensor = weight("w", (2, 512), Q6_K, seed=1)
    bad = with_d(tensor, 2, bits)
    path = Builder(tensors=[bad]).write(tmp_path / "model.gguf")
    exact = convert(path, tmp_path / "exact", Options(scales="exact", allow_nonfinite=True))
    assert exact.manifest.options["allow_nonfinite"] is True
    blocks = np.frombuffer(bad.data, np.uint8).reshape(4, 210)
    assert stored(tmp_path / "exact", "w.steps") == blocks[:, 208:].tobytes()
    assert stored(tmp_path / "exact", "w.scale") == blocks[:, 192:208].tobytes()
    convert(path, tmp_path / "bf16", Options(allow_nonfinite=True))
    scale = np.frombuffer(stored(tmp_path / "bf16", "w.scale"), "<u2").reshape(4, 16)
    kept = (scale.astype(np.uint32) << 16).view(np.float32)
    assert not np.isfinite(kept[2]).any()
    assert np.isfinite(np.delete(kept, 2, axis=0)).all()
