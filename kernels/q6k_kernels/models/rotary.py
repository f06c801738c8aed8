"""Rotary embeddings of our own, in place of a transformers module: of a part of each head, for short or long texts.

A head's values rotate in pairs that are half a head apart. Where only a part of a head rotates, transformers and
llama.cpp let pairs be half that part apart. Here the rows of q and k are moved when they are loaded (`halves`), so
that all pairs are half a head apart; those that do not rotate have an angle of 0. Scores do not change, as the rows
of q and k move alike. So one form of tables serves every model.

A file may have two tensors that divide the frequencies, one for contexts as long as those of training, one for
longer ones. Keys in a cache must all be rotated by the same. So the room for a text decides, as in llama.cpp, and
not its length so far: see `plan_for`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FACTORS_LONG, FACTORS_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Names of the tensors that divide frequencies, float (rotated / 2,)."""


def rotated(config: Any) -> int:
    """Return the values of a head that rotate, an even number."""
    part: float = config.rope_parameters.get("partial_rotary_factor", 1.0)
    count: int = round(part * config.head_dim)
    return count


def halves(head_dim: int, rotates: int) -> Tensor:
    """Return the file's row of each row of a head, int64 (head_dim,), so that pairs are half a head apart."""
    rows = torch.arange(head_dim)
    first, second, rest = rows[: rotates // 2], rows[rotates // 2 : rotates], rows[rotates:]
    return torch.cat([first, rest[: len(rest) // 2], second, rest[len(rest) // 2 :]])


class HeadRotary(nn.Module):
    """The angles of whole heads.

    Attributes:
        capacity: the most positions of a text; by default each call decides by its last position.

    Args:
        config: configuration of the model.
        factors: divisors of the frequencies in short and in long texts, float (rotated / 2,) each; None for none.
    """

    inv_freq: Tensor
    inv_freq_long: Tensor
    scales: Tensor

    def __init__(self, config: Any, factors: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        count = rotated(config)
        base = config.rope_parameters["rope_theta"] ** -(torch.arange(0, count, 2, dtype=torch.float) / count)
        short, long = (base / each for each in factors) if factors else (base, base)
        for name, frequencies in (("inv_freq", short), ("inv_freq_long", long)):
            still = frequencies.new_zeros((config.head_dim - count) // 2)
            self.register_buffer(name, torch.cat([frequencies, still]), persistent=False)
        # Of cosines and sines, where something rotates.
        scales = torch.where(self.inv_freq > 0, float(config.rotary_scale), 1.0)
        self.register_buffer("scales", torch.cat([scales, scales]), persistent=False)
        self.original = int(config.original_max_position_embeddings)
        self.capacity: int | None = None
        self._chooses = factors is not None

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and the sines of positions, int64 (B, T): (B, T, head_dim) in x's dtype."""
        if not self._chooses:
            frequencies = self.inv_freq
        elif self.capacity is not None:
            frequencies = self.inv_freq_long if self.capacity > self.original else self.inv_freq
        else:
            # On the device, as a graph cannot wait for a number.
            frequencies = torch.where(position_ids.max() < self.original, self.inv_freq, self.inv_freq_long)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scales).to(x.dtype), (angles.sin() * self.scales).to(x.dtype)


def rotaries(model: nn.Module) -> list[HeadRotary]:
    """Return a model's rotary embeddings that are of this kind."""
    return [module for module in model.modules() if isinstance(module, HeadRotary)]


@contextmanager
def plan_for(modules: Iterable[HeadRotary], capacity: int) -> Iterator[None]:
    """Rotate inside the context as texts of up to `capacity` positions need it."""
    before = [(module, module.capacity) for module in modules]
    for module, _ in before:
        module.capacity = capacity
    try:
        yield
    finally:
        for module, plan in before:
            module.capacity = plan
