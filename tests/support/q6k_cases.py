"""Rows of Q6_K to check operations with: like a model's, random, and extreme."""

from __future__ import annotations

from functools import cache

import gguf
import libgguf
import numpy as np
import torch

import oracles
import packed
from gguf_builder import q6k_blocks

Q6_K = gguf.GGMLQuantizationType.Q6_K
SHAPES = {"genuine": (5, 768), "heavy-tailed": (1, 512), "random": (7, 768), "extreme": (9, 256)}


@cache
def blocks(name: str) -> bytes:
    """Return the Q6_K rows of a shape in SHAPES."""
    n, k = SHAPES[name]
    rng = np.random.default_rng(11)
    if name == "genuine":
        return bytes(libgguf.quantize_rows((rng.normal(size=(n, k)) * 0.02).astype(np.float32), int(Q6_K)))
    if name == "heavy-tailed":
        return bytes(libgguf.quantize_rows((rng.standard_t(2, (n, k)) * 0.01).astype(np.float32), int(Q6_K)))
    if name == "random":
        return q6k_blocks(n * k // 256, seed=5)
    # Codes all -32, all 31 or random; extreme sub-scales; d zero, subnormal, normal, of both signs.
    rows = rng.integers(0, 256, (n, 210), dtype=np.uint8)
    rows[0:3, :192], rows[3:6, :192] = 0, 0xFF
    rows[:, 192:208] = [0x80, 0, 0x7F, 0xFF] * 4
    rows[0, 192:208] = 0x80
    steps = [-0.0, 5.96e-8, -5.96e-8, 6.09e-5, -6.1e-5, 0.015, -3e-6, 2e-7, 0.0]
    rows[:, 208:] = np.array(steps, dtype="<f2").view(np.uint8).reshape(n, 2)
    return rows.tobytes()


def planes(name: str, scales: str) -> dict[str, torch.Tensor]:
    """Return the planes of the rows."""
    return packed.planes_of(blocks(name), SHAPES[name], scales)


@cache
def parts(name: str, scales: str) -> tuple[oracles.F64, oracles.F64]:
    """Return codes -32..31 (N, K) and scales (N, K/16) of the rows, decoded element by element."""
    n, k = SHAPES[name]
    data = blocks(name)
    decoded = [oracles.q6k_block(data[at : at + 210]) for at in range(0, len(data), 210)]
    q = np.array([q for q, _ in decoded], dtype=np.float64).reshape(n, k)
    s = np.array([s for _, s in decoded], dtype=np.float64).reshape(n, -1)
    return q, oracles.rounded(s, "bfloat16") if scales == "bf16" else s


def inputs(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return activations with a row of zeros, a group of zeros, and outliers like a model's."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(3))
    x[-1, :32] = 0
    x[0, 5::97] *= 60
    if m > 2:
        x[1] = 0
    return x.to(dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return the name that the oracles use."""
    return str(dtype).removeprefix("torch.")
