"""Conversions end to end, against implementations of the formats that share nothing with the product."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import ggml_blocks
from bundle_helpers import checked_manifest, listing, shard_arrays
from gguf_builder import F16, F32, Q6_K, Q8_0, Builder, Tensor, small_model, weight
from q6k_convert.convert import stream
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.errors import InputRejectedError, Q6KConvertError, UsageError
from q6k_kernels.errors import GgufError, GgufRejectedError
from q6k_kernels.formats import blocks as blocks_of_formats
from q6k_kernels.formats import planes as planes_of_formats
from q6k_kernels.formats.types import PACKED_TYPES, WEIGHT_TYPES

Arrays = dict[str, tuple[str, list[int], bytes]]
Q8_1, F64, BF16, I8, I16, I32, I64 = 9, 28, 30, 24, 25, 26, 27
PLAIN = {F32: "F32", F16: "F16", BF16: "BF16", F64: "F64", I8: "I8", I16: "I16", I32: "I32", I64: "I64"}
WITHOUT_ROW = ("Q2_K", "Q3_K", "IQ1_M", "IQ2_XXS", "IQ3_S", "TQ1_0", "NVFP4")


# What the bundle must hold, one weight at a time


def bf16(value: float) -> int:
    """The bf16 nearest to an fp32 value, ties to even; one NaN for all."""
    bits = int(np.float32(value).view(np.uint32))
    if math.isnan(value):
        return 0x7FC0
    kept, rest = bits >> 16, bits & 0xFFFF
    return kept + (rest > 0x8000 or (rest == 0x8000 and kept % 2 == 1))


def block_codes(block: bytes) -> list[int]:
    """The 256 codes 0..63 of a Q6_K block."""
    codes = [0] * 256
    for half in (0, 1):
        ql, qh = block[64 * half :][:64], block[128 + 32 * half :][:32]
        for i in range(32):
            at = 128 * half + i
            codes[at] = (ql[i] & 15) | (qh[i] & 3) << 4
            codes[at + 32] = (ql[32 + i] & 15) | (qh[i] >> 2 & 3) << 4
            codes[at + 64] = ql[i] >> 4 | (qh[i] >> 4 & 3) << 4
            codes[at + 96] = ql[32 + i] >> 4 | (qh[i] >> 6) << 4
    return codes


def planes(data: bytes, scales: str) -> dict[str, bytes]:
    """The arrays of Q6_K blocks; rows are whole blocks, so one after the other is right for any shape."""
    arrays = {role: bytearray() for role in ("ql", "qh", "scale", "steps")}
    for at in range(0, len(data), 210):
        block = data[at : at + 210]
        codes = block_codes(block)
        for j in range(128):
            arrays["ql"].append((codes[2 * j] & 15) | (codes[2 * j + 1] & 15) << 4)
        for chunk in range(8):
            for odd in (0, 1):
                for w in range(4):
                    high = [codes[32 * chunk + 8 * w + odd + 2 * i] >> 4 for i in range(4)]
                    arrays["qh"].append(high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6)
        subs = struct.unpack("16b", block[192:208])
        (d,) = struct.unpack("<e", block[208:])
        if scales == "bf16":
            arrays["scale"] += struct.pack("<16H", *(bf16(d * sub) for sub in subs))
        else:
            arrays["scale"] += block[192:208]
            arrays["steps"] += block[208:]
    return {role: bytes(array) for role, array in arrays.items() if array}


def expected_arrays(tensor: Tensor, scales: str, other: str) -> Arrays:
    """Key -> dtype, shape, bytes of one tensor. Planes of types other than Q6_K are by the definition in numpy."""
    name, shape = str(tensor.name), list(tensor.shape)
    ggml = gguf.GGMLQuantizationType(tensor.type).name
    if tensor.type == Q6_K and len(shape) in (2, 3):
        *lead, k = shape
        dtypes = {"ql": "U8", "qh": "U8", "scale": "BF16" if scales == "bf16" else "I8", "steps": "F16"}
        width = {"ql": k // 2, "qh": k // 4, "scale": k // 16, "steps": k // 256}
        made = planes(tensor.data, scales)
        return {f"{name}.{role}": (dtypes[role], [*lead, width[role]], data) for role, data in made.items()}
    if ggml in PACKED_TYPES and len(shape) in (2, 3):
        (row,) = (row for row in WEIGHT_TYPES.values() if row.ggml == ggml)
        blocks = np.frombuffer(tensor.data, dtype=np.uint8).reshape(*shape[:-1], -1)
        decoded = blocks_of_formats.decode(blocks, row)
        packed = [*planes_of_formats.pack(decoded.codes, row), *(decoded.arrays[a.role] for a in row.scales)]
        return {
            f"{name}.{array.role}": (array.dtype, list(found.shape), found.tobytes())
            for array, found in zip(row.arrays, packed, strict=True)
        }
    if tensor.type in PLAIN:
        return {name: (PLAIN[tensor.type], shape, tensor.data)}
    if other == "raw":
        return {name: ("U8", [*shape[:-1], len(tensor.data) // math.prod(shape[:-1])], tensor.data)}
    if other == "bf16":
        values = dequantized(tensor).reshape(-1)
        return {name: ("BF16", shape, struct.pack(f"<{len(values)}H", *map(bf16, values)))}
    return {}


def dequantized(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tensor's weights by the gguf package, row by row."""
    rows = np.frombuffer(tensor.data, dtype=np.uint8).reshape(math.prod(tensor.shape[:-1]), -1)
    kind = gguf.GGMLQuantizationType(tensor.type)
    with np.errstate(all="ignore"):
        return gguf.dequantize(rows, kind).astype(np.float32).reshape(tensor.shape)


def stored_arrays(directory: Path) -> Arrays:
    """All arrays of a bundle, read by the safetensors library."""
    found: Arrays = {}
    for path in directory.glob("*.safetensors"):
        for key, array in safetensors.deserialize(path.read_bytes()):
            assert key not in found
            found[key] = (array["dtype"], list(array["shape"]), bytes(array["data"]))
    return found


def blocks(name: str, shape: tuple[int, ...], ggml: str) -> Tensor:
    """A tensor of random blocks with finite scales."""
    count = math.prod(shape) // ggml_blocks.SIZES[ggml][0]
    data = ggml_blocks.random_blocks(ggml, count, seed=len(name)).tobytes()
    return Tensor(name, shape, int(gguf.GGMLQuantizationType[ggml]), data)


def narrow(ggml: str) -> int:
    """A width of an odd number of blocks."""
    return 3 * ggml_blocks.SIZES[ggml][0]


def every_type() -> Builder:
    """small_model and one tensor of every other sort; 1-D and 4-D tensors are no planar weights."""
    builder = small_model()
    builder.tensors += [blocks(f"packed.{ggml}", (2, 2, narrow(ggml)), ggml) for ggml in sorted(PACKED_TYPES)]
    builder.tensors += [blocks(f"other.{ggml}", (2, 2, 256), ggml) for ggml in WITHOUT_ROW]
    builder.tensors += [weight(f"plain.{kind}", (3, 5), kind, seed=kind) for kind in PLAIN]
    builder.tensors += [blocks("one.q4_0", (32,), "Q4_0"), blocks("four.q4_k", (2, 1, 2, 256), "Q4_K")]
    builder.tensors += [weight("one.q6k", (512,), Q6_K, seed=51), weight("four.q6k", (2, 1, 2, 256), Q6_K, seed=52)]
    return builder


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor takes several pieces, so that positions and order matter."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 630)


# Arrays


@pytest.mark.parametrize("pieces", [3_400_000, 630])
@pytest.mark.parametrize("other", ["bf16", "raw", "skip"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_every_array_is_what_the_formats_text_says(
    scales: Literal["bf16", "exact"],
    other: Literal["bf16", "raw", "skip"],
    pieces: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", pieces)
    builder = every_type()
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "out", Options(scales, other))
    expected: Arrays = {}
    for tensor in builder.tensors:
        expected |= expected_arrays(tensor, scales, other)
    found = stored_arrays(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key] == array, key


def test_other_libraries_open_the_shards(tmp_path: Path) -> None:
    builder = small_model()
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "out", Options("exact", "raw"))
    path = tmp_path / "out" / "model.safetensors"
    loaded = safetensors.numpy.load_file(path)
    assert {key: (array.tobytes(), list(array.shape)) for key, array in loaded.items()} == {
        key: (data, shape) for key, (_, shape, data) in shard_arrays(path).items()
    }
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("token_embd.weight.scale").dtype == np.int8
        assert file.get_tensor("token_embd.weight.steps").dtype == np.float16


def test_an_exact_bundle_dequantises_to_the_bits_of_the_gguf_package(tmp_path: Path) -> None:
    tensor = weight("w", (3, 7, 512), seed=8)
    convert(Builder([tensor]).write(tmp_path / "m.gguf"), tmp_path / "out", Options("exact"))
    loaded = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    codes = np.array([c for at in range(0, len(tensor.data), 210) for c in block_codes(tensor.data[at : at + 210])])
    low = loaded["w.ql"].reshape(-1)
    assert [n for byte in low.tolist() for n in (byte & 15, byte >> 4)] == (codes & 15).tolist()
    scale = loaded["w.steps"].astype(np.float32).repeat(16, axis=-1) * loaded["w.scale"].astype(np.float32)
    weights = scale.repeat(16, axis=-1) * (codes - 32).astype(np.float32).reshape(tensor.shape)
    assert weights.view(np.uint32).tolist() == dequantized(tensor).view(np.uint32).tolist()


def with_d(tensor: Tensor, block: int, bits: int) -> Tensor:
    data = bytearray(tensor.data)
    data[210 * block + 208 : 210 * block + 210] = struct.pack("<H", bits)
    return replace(tensor, data=bytes(data))


@pytest.mark.parametrize(
    ("bits", "pieces"), [(0x7C00, 3_400_000), (0xFC00, 630), (0x7E01, 630), (0xFDFF, 3_400_000)]
)
def test_a_scale_that_is_not_finite_is_rejected_with_its_place_or_kept_if_asked(
    bits: int, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", pieces)
    tensor = with_d(weight("w", (4, 512), seed=1), 7, bits)
    path = Builder([weight("first", (2, 256)), tensor]).write(tmp_path / "m.gguf")
    at = path.read_bytes().index(tensor.data) + 7 * 210 + 208
    with pytest.raises(
        GgufRejectedError, match=rf"tensor 'w' at byte {at}: block 7 \(row 3, block 1 of it\)"
    ) as caught:
        convert(path, tmp_path / "out")
    assert "--allow-nonfinite" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    for scales in ("bf16", "exact"):
        convert(path, tmp_path / scales, Options(scales, allow_nonfinite=True))
        expected = expected_arrays(tensor, scales, "bf16")
        assert expected.items() <= stored_arrays(tmp_path / scales).items()


# The same bytes whatever the circumstances


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("size", [5_000_000_000, 3000, 1])
@pytest.mark.usefixtures("tiny_pieces")
def test_the_bundle_does_not_depend_on_the_number_of_workers(
    scales: Literal["bf16", "exact"], size: int, tmp_path: Path
) -> None:
    path, options = every_type().write(tmp_path / "m.gguf"), Options(scales, max_shard_size=size)
    bundles = []
    for jobs in (1, 2, 7):
        convert(path, tmp_path / str(jobs), options, jobs=jobs)
        bundles.append(listing(tmp_path / str(jobs)))
    assert bundles[0] == bundles[1] == bundles[2]


def test_the_bundle_depends_on_neither_time_nor_place_nor_piece_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = []
    for place, pieces in (("here", 3_400_000), ("there", 600), ("elsewhere", 1050)):
        (tmp_path / place).mkdir()
        path = small_model().write(tmp_path / place / "m.gguf")
        monkeypatch.setattr(stream, "PIECE_BYTES", pieces)
        convert(path, tmp_path / place / f"out-{place}", Options(max_shard_size=3000))
        bundles.append(listing(tmp_path / place / f"out-{place}"))
    assert bundles[0] == bundles[1] == bundles[2]


@pytest.mark.parametrize("size", [1, 2000, 4287, 4288, 1 << 40])
def test_shards_hold_whole_tensors_in_order_and_no_more_than_asked(size: int, tmp_path: Path) -> None:
    builder = every_type()
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "out", Options(max_shard_size=size))
    groups = [expected_arrays(tensor, "bf16", "bf16") for tensor in builder.tensors]
    # The first two tensors just fit into one of the sizes, and into another just not.
    assert sum(len(data) for group in groups[:2] for _, _, data in group.values()) == 4288
    files: list[list[str]] = [[]]
    filled = 0
    for group in groups:
        taken = sum(len(data) for _, _, data in group.values())
        if files[-1] and filled + taken > size:
            files.append([])
            filled = 0
        files[-1] += group
        filled += taken
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]  # fmt: skip
    found = {path.name: shard_arrays(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert {name: sorted(arrays) for name, arrays in found.items()} == {
        name: sorted(keys) for name, keys in zip(names, files, strict=True)
    }
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        assert json.loads(index.read_bytes()) == {
            "metadata": {
                "total_size": sum(len(data) for arrays in found.values() for _, _, data in arrays.values())
            },
            "weight_map": {key: name for name, keys in zip(names, files, strict=True) for key in keys},
        }


# Choice of tensors


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        (("*norm*",), (), {"output_norm.weight"}),
        (("blk.0.ffn_*", "output*"), ("*exps*", "*up*"), {"blk.0.ffn_gate.weight", "output_norm.weight"}),
        ((), ("blk.*", "token*"), {"output_norm.weight"}),
        (("blk.0.attn_[qk].weight",), (), {"blk.0.attn_q.weight", "blk.0.attn_k.weight"}),
    ],
)
def test_patterns_choose_the_tensors(
    include: tuple[str, ...], exclude: tuple[str, ...], kept: set[str], tmp_path: Path
) -> None:
    builder = small_model()
    path = builder.write(tmp_path / "m.gguf")
    convert(path, tmp_path / "out", Options(include=include, exclude=exclude))
    manifest = checked_manifest(tmp_path / "out")
    assert {t["name"] for t in manifest["tensors"] if t["storage"] != "skipped"} == kept
    assert {t["name"] for t in manifest["tensors"]} == {t.name for t in builder.tensors}
    expected: Arrays = {}
    for tensor in builder.tensors:
        if tensor.name in kept:
            expected |= expected_arrays(tensor, "bf16", "bf16")
    assert stored_arrays(tmp_path / "out") == expected
    assert manifest["options"]["include"] == list(include)
    assert manifest["options"]["exclude"] == list(exclude)


def refusal(
    builder: Builder, tmp_path: Path, kind: type[Q6KConvertError | GgufError], message: str, **options: Any
) -> str:
    path = builder.write(tmp_path / "m.gguf")
    with pytest.raises(kind, match=message) as caught:
        convert(path, tmp_path / "out", Options(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    return caught.value.remedy


def test_patterns_that_match_nothing_or_leave_nothing_are_refused(tmp_path: Path) -> None:
    small = small_model()
    for option in ("include", "exclude"):
        message = rf"--{option} 'nope\*' matches none of the 7 tensors"
        assert "inspect" in refusal(small, tmp_path, UsageError, message, **{option: ("*", "nope*")})
    message = "none of its 7 tensors would be stored"
    assert "--exclude" in refusal(small, tmp_path, UsageError, message, exclude=("*",))
    assert "--other" in refusal(
        Builder([weight("a", (32,), Q8_0)]), tmp_path, UsageError, "none of its 1", other="skip"
    )


def with_others() -> Builder:
    """small_model, a tensor whose type has no packed form, and one that is no matrix."""
    builder = small_model()
    builder.tensors += [blocks("two", (4, 256), "Q2_K"), blocks("one", (256,), "Q6_K")]
    return builder


def test_other_error_lists_the_tensors_it_refuses(tmp_path: Path) -> None:
    named = r"blk.0.ffn_up.weight \(Q3_K 4×256\), two \(Q2_K 4×256\), one \(Q6_K 256\)"
    message = rf"3 that are neither packed nor stored unchanged: {named}$"
    remedy = refusal(with_others(), tmp_path, InputRejectedError, message, other="error")
    assert "--other bf16, raw or skip" in remedy


def test_other_error_does_not_mind_what_is_excluded(tmp_path: Path) -> None:
    path = with_others().write(tmp_path / "m.gguf")
    convert(path, tmp_path / "out", Options(other="error", exclude=("one", "two", "*ffn_up*")))
    stored = {t["name"]: t["storage"] for t in checked_manifest(tmp_path / "out")["tensors"]}
    assert {name for name, storage in stored.items() if storage == "skipped"} == {
        "one",
        "two",
        "blk.0.ffn_up.weight",
    }
    assert "dequantized" not in stored.values()


def test_a_type_the_gguf_package_cannot_dequantise_is_refused_and_can_be_kept_raw(tmp_path: Path) -> None:
    odd = Tensor("odd", (2, 32), Q8_1, bytes(range(80)))
    builder = Builder([weight("a", (2, 256)), odd])
    remedy = refusal(builder, tmp_path, GgufRejectedError, "tensor 'odd' at byte .* no dequantiser for Q8_1")
    assert "--other raw" in remedy
    convert(tmp_path / "m.gguf", tmp_path / "out", Options(other="raw"))
    assert stored_arrays(tmp_path / "out")["odd"] == ("U8", [2, 40], odd.data)


def test_arrays_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    builder = Builder([weight("a", (2, 256)), weight("a.ql", (4,), F32)])
    message = "tensor 'a.ql' .* would have the name of one of tensor 'a'"
    assert "--exclude" in refusal(builder, tmp_path, GgufRejectedError, message)
