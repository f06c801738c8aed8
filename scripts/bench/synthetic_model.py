"""Write GGUF files of whole models with random weights, at the speed of the disk.

Weights are random Q6_K blocks: any byte is a valid code or sub-scale, and d gives the weights a standard deviation
of 0.02, as in a model before its training. A pattern of `PATTERN_BLOCKS` blocks repeats through the file, and each
tensor begins at another place in it. The number of blocks is a prime, so that rows of a tensor repeat as late as
possible.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from q6k_kernels.formats.blocks import BLOCK_BYTES, D_AT

PATTERN_BLOCKS = 65521
STANDARD_DEVIATION = 0.02
CODES_RMS, SUB_SCALES_RMS = math.sqrt((64**2 - 1) / 12 + 0.25), math.sqrt((256**2 - 1) / 12 + 0.25)
"""Root mean squares of -32..31 and of -128..127, all equally likely."""
WRITE_BYTES = 32 << 20
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
Q6_K, F32 = gguf.GGMLQuantizationType.Q6_K, gguf.GGMLQuantizationType.F32


@dataclass(frozen=True)
class Shape:
    """A model of the llama architecture, its head not tied to its embedding.

    Attributes:
        name: name of the shape.
        hidden, feed_forward: widths, multiples of 256.
        heads, kv_heads: numbers of attention heads, each `head_dim` wide.
        context: largest number of positions.
        theta: base of the rotary embeddings.
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

    def with_layers(self, layers: int) -> Shape:
        """Return the same shape with another number of layers."""
        return replace(self, layers=layers)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (N, K) of all weights that a token is multiplied with, by GGUF name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "attn_q": (q, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, q),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": (self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }
        found = {f"blk.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in layer.items()}
        return found | {"output.weight": (self.vocabulary, self.hidden)}

    @property
    def norms(self) -> list[str]:
        """GGUF names of the norm weights, each of shape (hidden,)."""
        of_layers = [f"blk.{i}.{name}.weight" for i in range(self.layers) for name in ("attn_norm", "ffn_norm")]
        return [*of_layers, "output_norm.weight"]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one position, 16 bits each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("tiny", 2, 256, 512, 4, 2, 64, 512),
    )
}
"""Shapes by name: Llama 3.1 8B, and a tiny one for a quick look."""


def write_model(path: Path, shape: Shape, threads: int) -> None:
    """Write a model of Q6_K only; the file appears complete or not at all.

    Args:
        path: path of the file.
        shape: shape of the model.
        threads: number of writing threads, each for one tensor at a time.
    """
    part = path.with_name(f"{path.name}.part")
    matrices = {"token_embd.weight": (shape.vocabulary, shape.hidden), **shape.linears}
    vectors = {name: np.ones(shape.hidden, dtype=np.float32) for name in shape.norms}
    vectors["rope_freqs.weight"] = frequency_factors(shape)
    writer = _described(part, shape)
    sizes = list[int]()
    for name, (n, k) in matrices.items():
        row_bytes = k // 256 * BLOCK_BYTES
        writer.add_tensor_info(name, (n, row_bytes), np.dtype(np.uint8), n * row_bytes, raw_dtype=Q6_K)
        sizes.append(n * row_bytes)
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=F32)
        sizes.append(values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = _aligned(part.stat().st_size)
    starts = [begin + sum(map(_aligned, sizes[:index])) for index in range(len(sizes))]
    pattern = random_blocks(PATTERN_BLOCKS).tobytes()
    # Twice, so that a whole pattern can be written at once from any block of the first half.
    twice = 2 * pattern
    random = np.random.default_rng(1)
    with part.open("r+b") as file, ThreadPoolExecutor(threads) as pool:
        os.ftruncate(file.fileno(), starts[-1] + _aligned(sizes[-1]))
        jobs = [
            pool.submit(_write_repeated, file.fileno(), start, size, twice, int(random.integers(PATTERN_BLOCKS)))
            for start, size in zip(starts, sizes[: len(matrices)], strict=False)
        ]
        for start, values in zip(starts[len(matrices) :], vectors.values(), strict=True):
            _write(file.fileno(), start, memoryview(values.tobytes()))
        for job in jobs:
            job.result()
    part.replace(path)


def random_blocks(count: int) -> npt.NDArray[np.uint8]:
    """Return Q6_K blocks, uint8 (count, 210), of finite weights with a standard deviation of 0.02."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (count, BLOCK_BYTES), dtype=np.uint8)
    size = STANDARD_DEVIATION / (CODES_RMS * SUB_SCALES_RMS)
    blocks[:, D_AT:] = (random.normal(size=(count, 1)) * size).astype("<f2").view(np.uint8)
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


def _described(path: Path, shape: Shape) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{shape.name}, {shape.layers} layers, random weights")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    return writer


def _write_repeated(fd: int, start: int, size: int, twice: bytes, first_block: int) -> None:
    """Fill a tensor with the pattern, beginning at one of its blocks."""
    view, length = memoryview(twice), len(twice) // 2
    at, end, begin = start, start + size, first_block * BLOCK_BYTES
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
