"""Write GGUF files of whole models with random weights, at the speed of the disk.

Weights are random blocks: any byte is a valid code or sub-scale, and the scales give the weights a standard
deviation of 0.02, as in a model before its training. A pattern of `PATTERN_BLOCKS` blocks of a type repeats through
the file, and each tensor begins at another place in it. The number of blocks is a prime, so that rows of a tensor
repeat as late as possible.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from q6k_kernels.formats.blocks import STEPS
from synthetic_shapes import Shape

PATTERN_BLOCKS = 65521
STANDARD_DEVIATION = 0.02
WRITE_BYTES = 32 << 20
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
Type = gguf.GGMLQuantizationType
MIXES = {
    "q4_k_m": (Type.Q4_K, Type.Q6_K),
    "q5_k_m": (Type.Q5_K, Type.Q6_K),
    "q6_k": (Type.Q6_K, Type.Q6_K),
    "q8_0": (Type.Q8_0, Type.Q8_0),
    "mxfp4": (Type.Q8_0, Type.Q8_0),
}
"""Mixes of types by name: that of most weights, and that of those with more bits; see `type_of`."""
OF_EXPERTS = {"mxfp4": Type.MXFP4}
"""Mix -> type of experts where it is neither."""
NARROW = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""Type -> the one that llama.cpp takes in its place for rows that are no multiple of 256."""


def type_of(mix: str, name: str, layers: int, head: str = "output.weight") -> Type:
    """Return the type of a weight, as llama.cpp chooses it.

    The head has more bits, and so have `attn_v`, `attn_qkv` and all `ffn_down` in the first and last eighth of the
    layers and in every third one between. The embedding is like most weights unless it is the head, too.

    Args:
        mix: a name in `MIXES`.
        name: GGUF name of the weight.
        layers: number of the model's layers.
        head: GGUF name of the head's weight.
    """
    usual, more = MIXES[mix]
    if "_exps." in name and mix in OF_EXPERTS:
        return OF_EXPERTS[mix]
    if name == head:
        return more
    if not any(part in name for part in ("attn_v.", "attn_qkv.", "ffn_down")):
        return usual
    layer, eighth = int(name.split(".")[1]), layers // 8
    ends = layer < eighth or layer >= 7 * layers // 8
    return more if ends or (layer - eighth) % 3 == 2 else usual


def write_model(path: Path, shape: Shape, threads: int, mix: str = "q6_k") -> None:
    """Write a model; the file appears complete or not at all.

    Args:
        path: path of the file.
        shape: shape of the model.
        threads: number of writing threads, each for one tensor at a time.
        mix: types of the weights, a name in `MIXES`.
    """
    part = path.with_name(f"{path.name}.part")
    matrices: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocabulary, shape.hidden)}
    matrices |= {**shape.linears, **shape.stacks}
    vectors = {name: np.ones(width, dtype=np.float32) for name, width in shape.norms.items()}
    if shape.wide:
        vectors["rope_freqs.weight"] = rotated_quarter(shape.wide[1])
        vectors |= {f"blk.{i}.layer_output_scale.weight": np.ones(1, np.float32) for i in range(shape.layers)}
    elif shape.architecture == "llama":
        vectors["rope_freqs.weight"] = frequency_factors(shape)
    if shape.architecture == "gemma4" and shape.experts:
        vectors |= routers(shape)
    vectors |= shape.vectors
    writer = _described(part, shape)
    sizes, types = list[int](), list[Type]()
    for name, (*rows, k) in matrices.items():
        kind = type_of(mix, name, shape.layers, shape.head)
        types.append(NARROW.get(kind, kind) if k % 256 else kind)
        block, size = gguf.GGML_QUANT_SIZES[types[-1]]
        sizes.append(math.prod(rows) * k // block * size)
        stored = (*rows, k // block * size)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), sizes[-1], raw_dtype=types[-1])
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=Type.F32)
        sizes.append(values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = _aligned(part.stat().st_size)
    starts = [begin + sum(map(_aligned, sizes[:index])) for index in range(len(sizes))]
    # Twice, so that a whole pattern can be written at once from any block of the first half.
    twice = {kind: 2 * random_blocks(kind, PATTERN_BLOCKS).tobytes() for kind in set(types)}
    random = np.random.default_rng(1)
    with part.open("r+b") as file, ThreadPoolExecutor(threads) as pool:
        os.ftruncate(file.fileno(), starts[-1] + _aligned(sizes[-1]))
        jobs = [
            pool.submit(
                _write_repeated, file.fileno(), start, size, twice[kind], int(random.integers(PATTERN_BLOCKS))
            )
            for start, size, kind in zip(starts, sizes, types, strict=False)
        ]
        for start, values in zip(starts[len(matrices) :], vectors.values(), strict=True):
            _write(file.fileno(), start, memoryview(values.tobytes()))
        for job in jobs:
            job.result()
    part.replace(path)


def random_blocks(kind: Type, count: int) -> npt.NDArray[np.uint8]:
    """Return blocks, uint8 (count, bytes), of finite weights with a mean near 0 and a standard deviation of 0.02.

    Args:
        kind: a type whose scales are one or two fp16 numbers, or an E8M0 exponent.
        count: number of blocks.
    """
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    first, *second = STEPS[kind.name]
    if first.size == 1:
        blocks[:, first.at] = 118 + random.integers(0, 3, count)
        return blocks
    spread = random.normal(size=(count, 1))

    def put(scale: float, least: float, some: npt.NDArray[np.uint8]) -> None:
        """Give blocks a scale and a min, both times the block's own random number."""
        for number, factor in zip((first, *second), (scale, least), strict=False):
            some[:, number.at : number.at + 2] = (spread[: len(some)] * factor).astype("<f2").view(np.uint8)

    def weights(scale: float, least: float) -> npt.NDArray[np.float32]:
        """Return the weights of a few blocks with unit numbers."""
        some = blocks[:256].copy()
        put(scale, least, some)
        return gguf.dequantize(some, kind).astype(np.float32)

    # A weight is linear in both numbers: the min takes away the mean that codes without a sign give it.
    alone = weights(1, 0)
    least = -float((alone * spread[:256]).mean() / (weights(0, 1) * spread[:256]).mean()) if second else 0.0
    size = STANDARD_DEVIATION / float(weights(1, least).std())
    put(size, least * size, blocks)
    return blocks


def frequency_factors(shape: Shape) -> npt.NDArray[np.float32]:
    """Return the factors by which Llama 3.1 divides the frequencies of rotary embeddings, (head_dim / 2,).

    A wave shorter than 2048 positions keeps its length, one longer than 8192 is stretched by 8, and one between
    by a factor between.
    """
    pairs = np.arange(0, shape.head_dim, 2, dtype=np.float64)
    wavelength = 2 * np.pi * shape.theta ** (pairs / shape.head_dim)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    return factors


def rotated_quarter(head_dim: int) -> npt.NDArray[np.float32]:
    """Return the factors of frequencies of which all but the first quarter do not rotate, (head_dim / 2,)."""
    pairs = np.arange(head_dim // 2)
    return np.where(pairs < head_dim // 8, 1.0, 1e30).astype(np.float32)


def routers(shape: Shape) -> dict[str, npt.NDArray[np.float32]]:
    """Return the weights of routers, random so that all experts are chosen, and their scales, by GGUF name."""
    assert shape.experts is not None  # noqa: S101 -- the caller has checked it
    random, count = np.random.default_rng(2), shape.experts[0]
    found = dict[str, npt.NDArray[np.float32]]()
    for layer in range(shape.layers):
        weights = random.normal(size=(count, shape.hidden)).astype(np.float32)
        found[f"blk.{layer}.ffn_gate_inp.weight"] = weights
        found[f"blk.{layer}.ffn_gate_inp.scale"] = np.ones(shape.hidden, np.float32)
        found[f"blk.{layer}.ffn_down_exps.scale"] = np.ones(count, np.float32)
    return found


def _described(path: Path, shape: Shape) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"{shape.name}, {shape.layers} layers, random weights")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    if shape.architecture != "qwen35moe":
        writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    size = shape.wide[1] if shape.wide else shape.head_dim
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(shape.theta)
    if shape.wide:
        writer.add_head_count_kv([heads for heads, _ in shape.key_heads])
        writer.add_key_length_swa(shape.head_dim)
        writer.add_value_length_swa(shape.head_dim)
        writer.add_rope_dimension_count(size)
        writer.add_rope_dimension_count_swa(shape.head_dim)
        writer.add_rope_freq_base_swa(10_000.0)
        writer.add_sliding_window(shape.window)
        writer.add_sliding_window_pattern([window is not None for window in shape.windows])
        writer.add_final_logit_softcapping(30.0)
    else:
        writer.add_head_count_kv(shape.kv_heads)
    if shape.experts:
        count, top, width = shape.experts
        writer.add_expert_count(count)
        writer.add_expert_used_count(top)
        writer.add_expert_feed_forward_length(width)
    if shape.architecture == "gemma3":
        writer.add_sliding_window(shape.window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    elif not shape.gemma:
        writer.add_rope_dimension_count(shape.rotated)
    shape.describe(writer)
    writer.add_layer_norm_rms_eps(1e-6 if shape.gemma else 1e-5)
    writer.add_vocab_size(shape.vocabulary)
    return writer


def _write_repeated(fd: int, start: int, size: int, twice: bytes, first_block: int) -> None:
    """Fill a tensor with the pattern, beginning at one of its blocks."""
    view, length = memoryview(twice), len(twice) // 2
    at, end, begin = start, start + size, first_block * (length // PATTERN_BLOCKS)
    while at < end:
        count = min(length, WRITE_BYTES, end - at)
        _write(fd, at, view[begin : begin + count])
        at, begin = at + count, (begin + count) % length


def _write(fd: int, at: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        at, data = at + written, data[written:]


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT
