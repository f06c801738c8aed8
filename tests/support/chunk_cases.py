"""Heads and delta nets of chunks of a prompt: kernels against the same in plain torch, chunk after chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step_reference import TorchOperations

CASES: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (64, 3, 0, 64, {}),
    (96, 1, 24, 96, {"softcap": 2.0}),
    (128, 2, 0, 64, {"gated": True}),
    (256, 2, 24, 256, {"norms": True, "values_normed": True}),
    (512, 2, 0, 512, {"norms": True, "values_normed": True, "grows": True}),
    (64, 2, 0, 32, {"neighbours": True, "norms": True, "normed": "projection"}),
    (128, 1, 24, 128, {"sinks": True, "norms": True, "normed": "rotated head"}),
    (96, 2, 24, 96, {"codes": True}),
    (512, 1, 0, 64, {"codes": True, "norms": True}),
]
"""Size of a head, queries that share keys, window, values that rotate, and what else there is."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def cache(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, window: int) -> Cached:
    """Return an empty cache, of numbers of a dtype; of int8, with scales."""
    keys, values = (torch.zeros(shape, dtype=dtype).to(device) for _ in range(2))
    of_keys, of_values = (torch.zeros(shape[:-1]).to(device) for _ in range(2))
    return Cached(keys, values, window, scales=(of_keys, of_values) if dtype is torch.int8 else None)


def heads_in_chunks(
    run: Any,
    dtype: torch.dtype,
    device: str,
    dim: int,
    group: int,
    window: int,
    rotated: int,
    more: dict[str, Any],
    scale: int = 1,
) -> None:
    """Compare chunks after each other: the second wraps a ring, the third is longer than one.

    Args:
        run: the kernels' operations.
        dtype: dtype of activations.
        device: where they run.
        dim, group, window, rotated, more: see `CASES`.
        scale: factor of windows, slots and chunks.
    """
    key_heads, window = 2, window * scale
    slots, positions = scale * (40 if window else 96), 96 * scale
    widths = [
        dim * (count if more.get("normed") == "projection" else 1) for count in (key_heads * group, key_heads)
    ]
    norms = [Norm(1 + random(k).to(device) / 4, 1e-5) if "norms" in more else None for k in widths]
    angles = 3 * random(positions, rotated // 2, seed=3).to(device)
    heads = Heads(
        *(
            key_heads * group,
            key_heads,
            dim,
            0.5 * dim**-0.5,
            more.get("softcap"),
            *norms,
            angles.cos(),
            angles.sin(),
        ),
        values_normed=more.get("values_normed", False),
        growth=1 + random(positions).abs().to(device) if "grows" in more else None,
        gated=more.get("gated", False),
        normed=more.get("normed", "head"),
        neighbours=more.get("neighbours", False),
        sinks=2 * random(key_heads * group).to(device) if "sinks" in more else None,
    )
    start, shape, codes = 0, (1, key_heads, slots, dim), more.get("codes", False)
    mine, theirs = (cache(shape, torch.int8 if codes else dtype, device, window) for _ in range(2))
    for rows in (21 * scale, 24 * scale + 3, 47 * scale):
        sizes = [heads.count * dim * (1 + heads.gated), key_heads * dim, key_heads * dim]
        product = random(rows, sum(sizes), seed=rows).to(device, dtype).split(sizes, -1)
        position = torch.arange(start, start + rows, device=device)
        found, expected = (
            each.attend(*product, heads, replace(cached, start=start), position, []).halves
            for each, cached in ((run, mine), (TorchOperations(), theirs))
        )
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-2, atol=1 if codes else 1e-2)
        for one, other in zip(mine.scales or (), theirs.scales or (), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=0)
        start += rows


def nets_in_chunks(run: Any, dtype: torch.dtype, device: str, tiled: bool, scale: int = 1) -> None:
    """Compare a gated delta net of chunks after each other: of fewer tokens than the convolution sees, and of more.

    Args:
        run: the kernels' operations.
        dtype: dtype of activations.
        device: where they run.
        tiled: see `DeltaHeads`.
        scale: factor of the chunks.
    """
    dim, keys, values = 128, 2, 6
    channels = (2 * keys + values) * dim
    numbers = [random(channels, 4), -2 * random(values).abs(), random(values), random(dim).abs() + 0.5]
    heads = DeltaHeads(keys, values, dim, dim, *(each.to(device) for each in numbers), epsilon=1e-6, tiled=tiled)
    mine, theirs = (
        (torch.zeros(1, channels, 4, dtype=dtype).to(device), random(1, values, dim, dim).to(device))
        for _ in range(2)
    )
    for tokens in (3, 37 * scale, 16):
        # 20 and more take the other branch of softplus.
        sizes, spread = [channels, values * dim, values, values], torch.tensor([1.0, 2.0, 2.0, 15.0])
        joined = random(tokens, sum(sizes), seed=tokens) * spread.repeat_interleave(torch.tensor(sizes))
        projected = joined.to(device, dtype).split(sizes, -1)
        found, expected = (
            each.delta(*projected, heads, states, []).halves
            for each, states in ((run, mine), (TorchOperations(), theirs))
        )
        assert torch.equal(mine[0], theirs[0])
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-3, atol=2e-3)
        difference = (found.double() - expected.double()).abs()
        assert float(difference.max()) < 8 * torch.finfo(dtype).eps * float(expected.abs().max())
