"""Build tiny GGUF files in memory, right or deliberately wrong, written from the format's text.

Shares no code with the reader under test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q4_0, Q5_0, Q8_0, Q3_K, Q4_K, Q6_K = 0, 1, 2, 6, 8, 11, 12, 14
SIZES = {
    F32: (1, 4),
    F16: (1, 2),
    Q4_0: (32, 18),
    Q5_0: (32, 22),
    Q8_0: (32, 34),
    Q3_K: (256, 110),
    Q4_K: (256, 144),
    Q6_K: (256, 210),
}
SIZES |= {24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)}
TYPE_CODES = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip


def string(text: str | bytes) -> bytes:
    """Return a GGUF string."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(content: Any, kind: str | None = None) -> bytes:
    """Return type and value as bytes; the type is `kind`, or follows from the Python type."""
    if isinstance(content, bool):
        kind = kind or "bool"
    if isinstance(content, int):
        kind = kind or "u32"
    if isinstance(content, float):
        kind = kind or "f32"
    if isinstance(content, str | bytes):
        return struct.pack("<I", 8) + string(content)
    if isinstance(content, list):
        if content and isinstance(content[0], str | bytes):
            return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(string, content))
        code, form = TYPE_CODES[kind or ("f32" if content and isinstance(content[0], float) else "i32")]
        return struct.pack(f"<IIQ{len(content)}{form}", 9, code, len(content), *content)
    code, form = TYPE_CODES[kind or "u32"]
    return struct.pack("<I" + form, code, content)


def key_value(key: str | bytes, content: Any, kind: str | None = None) -> bytes:
    """Return a key-value pair as bytes."""
    return string(key) + value(content, kind)


@dataclass
class Tensor:
    """One tensor: `shape` in torch order, `data` its bytes in the file."""

    name: str | bytes
    shape: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None  # from the start of the data section; laid out in order if None

    def record(self, offset: int) -> bytes:
        """Return the tensor's entry in the tensor list."""
        dims = tuple(reversed(self.shape))
        return string(self.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, self.type, offset)


@dataclass
class Builder:
    """Content of a GGUF; every field can be set to something wrong."""

    tensors: list[Tensor] = field(default_factory=list)
    kv: list[bytes] = field(default_factory=lambda: [key_value("general.architecture", "llama")])
    version: int = 3
    alignment: int = 32  # used for the layout; add the key yourself if it is not 32
    magic: bytes = b"GGUF"
    tensor_count: int | None = None
    kv_count: int | None = None
    pad_end: bool = True

    def header(self) -> bytes:
        """Return everything before the padding that precedes the data."""
        records, at = [], 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            records.append(tensor.record(offset))
            at = _aligned(offset + len(tensor.data), self.alignment)
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        kv_count = len(self.kv) if self.kv_count is None else self.kv_count
        return (
            self.magic
            + struct.pack("<IQQ", self.version, tensor_count, kv_count)
            + b"".join(self.kv)
            + b"".join(records)
        )

    def build(self) -> bytes:
        """Return the whole file."""
        out = bytearray(self.header())
        if not self.tensors:
            return bytes(out)
        start = _aligned(len(out), self.alignment)
        at = 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            at = _aligned(offset + len(tensor.data), self.alignment)
            end = start + offset + len(tensor.data)
            out.extend(bytes(max(0, end - len(out))))
            out[start + offset : end] = tensor.data
        if self.pad_end:
            out.extend(bytes(_aligned(len(out), self.alignment) - len(out)))
        return bytes(out)

    def write(self, path: Path) -> Path:
        """Write the whole file to disk."""
        path.write_bytes(self.build())
        return path


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def q6k_blocks(count: int, seed: int = 0) -> bytes:
    """Return random Q6_K blocks; d is finite, of a realistic size, often subnormal, of both signs."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 210), dtype=np.uint8)
    blocks[:, 208:] = (rng.normal(size=(count, 1)) * 3e-5).astype("<f2").view(np.uint8)
    return blocks.tobytes()


def weight(name: str, shape: tuple[int, ...], kind: int = Q6_K, seed: int = 0) -> Tensor:
    """Return a tensor of random finite content."""
    count = int(np.prod(shape))
    if kind == Q6_K:
        return Tensor(name, shape, kind, q6k_blocks(count // 256, seed))
    rng = np.random.default_rng(seed)
    if kind in (F32, F16):
        return Tensor(name, shape, kind, rng.normal(size=count).astype("<f4" if kind == F32 else "<f2").tobytes())
    block_weights, block_bytes = SIZES[kind]
    blocks = rng.integers(0, 256, (count // block_weights, block_bytes), dtype=np.uint8)
    if kind == Q3_K:
        blocks[:, -2:] = rng.normal(size=(len(blocks), 1)).astype("<f2").view(np.uint8)
    elif block_weights > 1:  # d (and dmin) come first in the other types
        blocks[:, :2] = rng.normal(size=(len(blocks), 1)).astype("<f2").view(np.uint8)
        if kind == Q4_K:
            blocks[:, 2:4] = rng.normal(size=(len(blocks), 1)).astype("<f2").view(np.uint8)
    return Tensor(name, shape, kind, blocks.tobytes())


def small_model() -> Builder:
    """Return a model with tensors of most types: embedding, 2-D and 3-D packed weights, Q3_K, floats."""
    return Builder(
        tensors=[
            weight("token_embd.weight", (5, 512), seed=1),
            weight("output_norm.weight", (512,), F32, seed=2),
            weight("blk.0.attn_q.weight", (3, 256), seed=3),
            weight("blk.0.ffn_down_exps.weight", (2, 3, 256), seed=4),
            weight("blk.0.ffn_up.weight", (4, 256), Q3_K, seed=5),
            weight("blk.0.attn_k.weight", (2, 256), Q4_K, seed=6),
            weight("blk.0.ffn_gate.weight", (2, 64), F16, seed=7),
        ],
        kv=[
            key_value("general.architecture", "llama"),
            key_value("llama.block_count", 1),
            key_value("llama.rope.freq_base", 10000.0),
            key_value("tokenizer.ggml.tokens", ["<s>", "a", "é", ""]),
            key_value("tokenizer.ggml.scores", [0.0, -1.5, 2.0, 3.0]),
            key_value("tokenizer.ggml.add_bos_token", True),
        ],
    )


def header(tensors: int, pairs: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def record(name: str | bytes, dims: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    """Return a tensor record; `dims` as in the file, fastest first."""
    return Tensor(name, dims[::-1], kind, b"").record(offset)


def tensors(*raw: bytes, data: int = 4096) -> Callable[[], bytes]:
    """Return a file of these tensor records, with zeros as data and no key-value pairs."""
    return lambda: header(len(raw), 0) + b"".join(raw) + bytes(data)
