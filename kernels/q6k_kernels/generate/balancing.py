"""Queries and keys of like sizes, for a cache of codes: what is rounded then counts least.

Codes round all values of a key alike, in proportion to its largest. A score sums their products with a query's, so
its error grows with the sizes of both vectors. It stays the same, without rounding, if keys are multiplied with
factors and queries divided by them, and the two sizes have the least product with

    factor[d] = sqrt(size of queries[d] / size of keys[d])

The weights of norms tell these sizes, and take the factors: nothing is left to compute. Values that rotate together
have one factor, so that it may come before the rotation. Heads without norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from q6k_kernels.generate.cache_codes import LEAST
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Heads, Norm
from q6k_kernels.generate.step_layers import StepLayer

_SMALLEST = 2.0**-20
"""The least square of a weight, as a part of the largest."""


def balanced(layers: Sequence[StepLayer], source: Sequence[int]) -> list[StepLayer]:
    """Return layers whose heads have balanced queries and keys.

    Args:
        layers: the layers of a model.
        source: the layer whose keys each of them uses.
    """
    by = [None if isinstance(layer.heads, DeltaHeads) else factors(layer.heads) for layer in layers]
    return [
        layer if isinstance(layer.heads, DeltaHeads) else replace(layer, heads=multiplied(layer.heads, by[of]))
        for layer, of in zip(layers, source, strict=True)
    ]


def factors(heads: Heads) -> Tensor | None:
    """Return the factors of keys, float32 (key heads, dim), or (1, dim) if they are alike; None without norms."""
    if heads.q_norm is None or heads.k_norm is None:
        return None
    rows = heads.key_heads if heads.normed == "projection" else 1
    weights = heads.q_norm.weight, heads.k_norm.weight
    queries, keys = (weight.square().view(rows, -1, heads.dim).mean(1) for weight in weights)
    if heads.normed != "rotated head":
        queries, keys = _alike(queries, heads), _alike(keys, heads)
    return (_bounded(queries) / _bounded(keys)) ** 0.25


def multiplied(heads: Heads, by: Tensor | None) -> Heads:
    """Return heads whose keys are multiplied with factors, if there are any, and queries divided by them."""
    if by is None:
        return heads
    return replace(heads, q_norm=_weighted(heads.q_norm, 1 / by), k_norm=_weighted(heads.k_norm, by))


def _alike(squares: Tensor, heads: Heads) -> Tensor:
    """Return the means of the pairs that rotate together in place of their values."""
    rotated = 2 * heads.cosines.shape[-1]
    pairs, along = ((-1, 2), 2) if heads.neighbours else ((2, -1), 1)
    turning = squares[:, :rotated].reshape(len(squares), *pairs)
    found = squares.clone()
    found[:, :rotated] = turning.mean(along, keepdim=True).expand_as(turning).flatten(1)
    return found


def _bounded(squares: Tensor) -> Tensor:
    return squares.maximum(squares.amax(-1, keepdim=True) * _SMALLEST).clamp_min(LEAST)


def _weighted(norm: Norm | None, by: Tensor) -> Norm | None:
    if norm is None:
        return None
    weight = norm.weight.view(len(by), -1, by.shape[1]) * by[:, None]
    return replace(norm, weight=weight.flatten())
