"""Write GGUF files of whole models with random weights, at the speed of the disk.

Weights are random blocks: any byte is a valid code or sub-scale, and the scales give the weights a standard
deviation of 0.02, as in a model before its training. A pattern of `PATTERN_BLOCKS` blocks of a type repeats through
the file, and each tensor begins at another place in it. The number of blocks is a prime, so that rows of a tensor
repeat as late as possible.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from q6k_kernels.formats.blocks import STEPS

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
}
"""Mixes of types by name: that of most weights, and that of those with more bits; see `type_of`."""


@dataclass(frozen=True)
class Shape:
    """A model of the architecture llama, or of gemma3 or gemma4: head and embedding tied, windows in most layers.

    Attributes:
        name: name of the shape.
        hidden, feed_forward: widths, multiples of 256.
        heads, kv_heads: numbers of attention heads, each `head_dim` wide.
        context: largest number of positions.
        theta: base of the rotary embeddings.
        window: positions that most layers of gemma3 and gemma4 see, or 0 for llama.
        wide: number and size of the key heads in layers of gemma4 without a window, whose keys are values too.
    """

    name: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int = 8192
    theta: float = 500_000.0
    window: int = 0
    wide: tuple[int, int] | None = None

    def with_layers(self, layers: int) -> Shape:
        """Return the same shape with another number of layers."""
        return replace(self, layers=layers)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (N, K) of all weights that a token is multiplied with, by GGUF name."""
        found = dict[str, tuple[int, int]]()
        for layer, (kv_heads, size) in enumerate(self.key_heads):
            q, kv = self.heads * size, kv_heads * size
            of_layer = {
                "attn_q": (q, self.hidden),
                "attn_k": (kv, self.hidden),
                "attn_v": (kv, self.hidden),
                "attn_output": (self.hidden, q),
                "ffn_gate": (self.feed_forward, self.hidden),
                "ffn_up": (self.feed_forward, self.hidden),
                "ffn_down": (self.hidden, self.feed_forward),
            }
            if self.wide and self.windows[layer] is None:
                del of_layer["attn_v"]
            found |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return found | {self.head: (self.vocabulary, self.hidden)}

    @property
    def key_heads(self) -> list[tuple[int, int]]:
        """Number and size of the key heads of each layer."""
        usual = self.kv_heads, self.head_dim
        return [self.wide if self.wide and window is None else usual for window in self.windows]

    @property
    def gemma(self) -> bool:
        """Whether the architecture is gemma3 or gemma4."""
        return self.window > 0

    @property
    def architecture(self) -> str:
        """Name of the architecture in GGUF."""
        return "gemma4" if self.wide else "gemma3" if self.gemma else "llama"

    @property
    def head(self) -> str:
        """GGUF name of the head's weight."""
        return "token_embd.weight" if self.gemma else "output.weight"

    @property
    def norms(self) -> dict[str, int]:
        """Widths of the norm weights, by GGUF name."""
        found = {"output_norm.weight": self.hidden}
        for layer, (_, size) in enumerate(self.key_heads):
            of_layer = {"attn_norm": self.hidden, "ffn_norm": self.hidden}
            if self.gemma:
                of_layer |= {"post_attention_norm": self.hidden, "post_ffw_norm": self.hidden}
                of_layer |= {"attn_q_norm": size, "attn_k_norm": size}
            found |= {f"blk.{layer}.{name}.weight": width for name, width in of_layer.items()}
        return found

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees, or None for all: every sixth layer of a gemma sees all."""
        return [self.window if self.gemma and (i + 1) % 6 else None for i in range(self.layers)]

    def kv_bytes(self, positions: float) -> float:
        """Return the bytes of the keys and values that a token after so many positions needs, 16 bits a number."""
        seen = (positions if window is None else min(positions, window) for window in self.windows)
        return sum(2 * each * heads * size * 2 for each, (heads, size) in zip(seen, self.key_heads, strict=True))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("gemma-27b", 62, 5376, 21504, 32, 16, 128, 262144, 131072, 1_000_000.0, window=1024),
        Shape(
            *("gemma4-31b", 60, 5376, 21504, 32, 16, 256, 262144, 262144, 1_000_000.0), window=1024, wide=(4, 512)
        ),
        Shape("tiny", 2, 256, 512, 4, 2, 64, 512),
        Shape("tiny-gemma", 7, 256, 512, 4, 2, 64, 512, 1024, 1_000_000.0, window=16),
        Shape("tiny-gemma4", 6, 256, 512, 4, 2, 64, 512, 1024, 1_000_000.0, window=16, wide=(1, 128)),
    )
}
"""Shapes by name: Llama 3.1 8B, Gemma 3 27B, Gemma 4 31B, and a tiny one of each for a quick look."""


def type_of(mix: str, name: str, layers: int, head: str = "output.weight") -> Type:
    """Return the type of a weight, as llama.cpp chooses it.

    The head has more bits, and so have `attn_v` and `ffn_down` in the first and last eighth of the layers and in
    every third one between. The embedding is like most weights unless it is the head, too.

    Args:
        mix: a name in `MIXES`.
        name: GGUF name of the weight.
        layers: number of the model's layers.
        head: GGUF name of the head's weight.
    """
    usual, more = MIXES[mix]
    if name == head:
        return more
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
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
    matrices = {"token_embd.weight": (shape.vocabulary, shape.hidden), **shape.linears}
    vectors = {name: np.ones(width, dtype=np.float32) for name, width in shape.norms.items()}
    if shape.wide:
        vectors["rope_freqs.weight"] = rotated_quarter(shape.wide[1])
        vectors |= {f"blk.{i}.layer_output_scale.weight": np.ones(1, np.float32) for i in range(shape.layers)}
    elif not shape.gemma:
        vectors["rope_freqs.weight"] = frequency_factors(shape)
    writer = _described(part, shape)
    sizes, types = list[int](), [type_of(mix, name, shape.layers, shape.head) for name in matrices]
    for (name, (n, k)), kind in zip(matrices.items(), types, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = k // block * size
        writer.add_tensor_info(name, (n, row_bytes), np.dtype(np.uint8), n * row_bytes, raw_dtype=kind)
        sizes.append(n * row_bytes)
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


def _described(path: Path, shape: Shape) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"{shape.name}, {shape.layers} layers, random weights")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
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
    if shape.architecture == "gemma3":
        writer.add_sliding_window(shape.window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    elif not shape.gemma:
        writer.add_rope_dimension_count(shape.head_dim)
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
