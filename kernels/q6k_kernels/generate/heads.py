"""The attention heads of a pass: their sizes and numbers, and their computation in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from q6k_kernels.generate.attention import SCORES_AT_ONCE, softmax_beside
from q6k_kernels.generate.cache_codes import coded, decoded, mixed
from q6k_kernels.models.layer import NormedPart


@dataclass(frozen=True)
class Norm:
    """A root mean square norm.

    Attributes:
        weight: its whole factor, float32 (K,).
        epsilon: the number that is added to the mean of squares.
        centred: whether the mean is subtracted before.
    """

    weight: Tensor
    epsilon: float
    centred: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of (..., K) in fp32."""
        x = x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer.

    Attributes:
        count: number of query heads.
        key_heads: number of heads of keys and values, a divisor of `count`.
        dim: size of a head.
        scale: factor of the scores.
        softcap: soft cap of the scores, or None.
        q_norm: norm of queries with `weight` (dim,), or (count * dim,) if it is of the whole projection; or None.
        k_norm: norm of keys, as `q_norm`, with the epsilon of that; or None.
        cosines: cosines of rotary angles, float32 (positions, half the rotated values of a head): the first ones,
            all of them or fewer.
        sines: sines of rotary angles, as `cosines`.
        values_normed: whether each value head has a norm, without weights and with the epsilon of `q_norm`.
        growth: further factors of the scores by the position of the query, float32 (positions,), or None.
        gated: whether each query is followed by a gate, whose logistic function multiplies the head's output.
        normed: what `q_norm` and `k_norm` are norms of.
        neighbours: whether neighbours rotate, rather than the halves of what rotates.
        sinks: scores of no key, by query head, that take a part of the weights, float32 (count,), or None.
    """

    count: int
    key_heads: int
    dim: int
    scale: float
    softcap: float | None
    q_norm: Norm | None
    k_norm: Norm | None
    cosines: Tensor
    sines: Tensor
    values_normed: bool = False
    growth: Tensor | None = None
    gated: bool = False
    normed: NormedPart = "head"
    neighbours: bool = False
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Cached:
    """A layer's part of the cache.

    Attributes:
        keys: (places, key heads, slots, dim) in the model's dtype, or codes of int8, see `cache_codes`; contiguous.
        values: (places, key heads, slots, dim), as `keys`.
        window: size of the sliding window, whose slots are a ring; 0 for full attention, a slot for each position.
        start: position of the first token of a chunk; None in a step, whose position only the device knows.
        places: in a step of several texts, the place of each token's text, int64 (M,); None if there is one place.
        scales: scales of codes, of keys and of values, each float32 (places, key heads, slots); or None.
        reach: slots that a step reads at most, the first; None: all.
    """

    keys: Tensor
    values: Tensor
    window: int
    start: int | None = None
    places: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None
    reach: int | None = None

    @property
    def slots_read(self) -> int:
        """The most slots that a step reads."""
        slots = self.keys.shape[-2]
        return slots if self.reach is None else min(self.reach, slots)

    def place(self, at: int) -> Cached:
        """Return the part of the text in one place."""
        keys, values, *scales = (each[at : at + 1] for each in (self.keys, self.values, *(self.scales or ())))
        return Cached(keys, values, self.window, self.start, None, (scales[0], scales[1]) if scales else None)

    def read(self, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the slots before `end`, or of all, of one text, (key heads, slots, dim)."""
        keys, values = self.keys[0, :, :end], self.values[0, :, :end]
        if self.scales is None:
            return keys, values
        of_keys, of_values = self.scales
        return decoded(keys, of_keys[0, :, :end]), decoded(values, of_values[0, :, :end])

    def write(self, slot: Tensor, new: tuple[Tensor, Tensor]) -> None:
        """Write keys and values, (key heads, M, dim), to slots, int64 (M,); the last ones, if a ring has fewer."""
        slots = self.keys.shape[-2]
        for index, (held, each) in enumerate(zip((self.keys, self.values), new, strict=True)):
            written = each[:, -slots:]
            if self.scales is not None:
                written, scales = coded(written)
                self.scales[index][0].index_copy_(1, slot[-slots:], scales)
            held[0].index_copy_(1, slot[-slots:], written)


def attended(
    q: Tensor, k: Tensor | None, v: Tensor | None, heads: Heads, cached: Cached, position: Tensor
) -> Tensor:
    """Write keys and values to the cache, and attend to the cache.

    Args:
        q: queries before norms and rotation, (M, count * dim), or with gates (M, count * 2 * dim).
        k: keys before norms and rotation, (M, key heads * dim); None if an earlier layer wrote them, and then
            with one token only, as a ring may hold no more than the last token sees.
        v: values before norms, (M, key heads * dim); None if an earlier layer wrote them.
        heads: the heads of the layer.
        cached: the layer's part of the cache.
        position: positions of the tokens, int64 (M,), each one more than the last; in a step of several
            texts those of the last tokens of all places, (P,).

    Returns:
        (M, count * dim).
    """
    if cached.places is not None:
        return _attended_of_texts(q, k, v, heads, cached, cached.places.tolist(), position)
    queries, *gate = q.view(len(q), heads.count, -1, heads.dim).unbind(2)
    queries = _turned(queries, heads.q_norm, heads, position)
    queries = queries if cached.scales is None else mixed(queries)
    new = None
    if k is not None and v is not None:
        key, value = (each.view(len(q), heads.key_heads, heads.dim) for each in (k, v))
        key = _turned(key, heads.k_norm, heads, position)
        key = key if cached.scales is None else mixed(key)
        if heads.values_normed and heads.q_norm is not None:
            value = _normed(value, Norm(torch.ones(heads.dim, device=v.device), heads.q_norm.epsilon))
        new = key.transpose(0, 1), value.transpose(0, 1)
    keys, values, held = _stored(cached, new, position)
    window = cached.window or cached.keys.shape[-2]
    count = max(1, SCORES_AT_ONCE // (heads.count * len(held)))
    outs = []
    for part, at in zip(torch.split(queries, count), torch.split(position, count), strict=True):
        seen = (held >= 0) & (held <= at[:, None]) & (held > at[:, None] - window)
        of_keys = part.view(len(at), heads.key_heads, -1, heads.dim).permute(1, 2, 0, 3)
        scores = of_keys.float() @ keys.float()[:, None].transpose(2, 3) * heads.scale
        if heads.growth is not None:
            scores = scores * heads.growth[at][:, None]
        if heads.softcap is not None:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        sinks = None if heads.sinks is None else heads.sinks.view(heads.key_heads, -1, 1, 1)
        weights = softmax_beside(scores.masked_fill(~seen, -torch.inf), sinks)
        outs.append((weights @ values.float()[:, None]).to(q.dtype).permute(2, 0, 1, 3).flatten(1, 2))
    out = torch.cat(outs)
    return (out * gate[0].sigmoid() if heads.gated else out).flatten(1)


def _attended_of_texts(
    q: Tensor, k: Tensor | None, v: Tensor | None, heads: Heads, cached: Cached, places: list[int], position: Tensor
) -> Tensor:
    """Attend with a token of each text to the cache in its place."""

    def of_text(row: int, place: int) -> Tensor:
        at = slice(row, row + 1)
        own_k, own_v = (None if each is None else each[at] for each in (k, v))
        return attended(q[at], own_k, own_v, heads, cached.place(place), position[place : place + 1])

    return torch.cat([of_text(row, place) for row, place in enumerate(places)])


def _turned(vectors: Tensor, norm: Norm | None, heads: Heads, position: Tensor) -> Tensor:
    """Return queries or keys, (M, heads, dim), with their norm and rotated, of positions, int64 (M,)."""
    if heads.normed == "rotated head":
        return _normed(_rotated(vectors, heads, position), norm)
    whole = vectors.flatten(1) if heads.normed == "projection" else vectors
    return _rotated(_normed(whole, norm).view_as(vectors), heads, position)


def _normed(vectors: Tensor, norm: Norm | None) -> Tensor:
    return vectors if norm is None else norm(vectors).to(vectors.dtype)


def _stored(cached: Cached, new: tuple[Tensor, Tensor] | None, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write keys and values of tokens, (heads, M, dim), to the cache.

    Returns:
        Keys and values that the tokens may see, (heads, K, dim), and their positions, (K,), negative for none.
    """
    slots = cached.keys.shape[-2]
    slot, around, length = position % slots, torch.arange(slots, device=position.device), len(position)
    # Joined before writing: new tokens overwrite slots that the first of them still see.
    if new is not None and cached.window > 0 and length > 1:
        rounded = new if cached.scales is None else (decoded(*coded(new[0])), decoded(*coded(new[1])))
        seen = [torch.cat(each, 1) for each in zip(cached.read(), rounded, strict=True)]
        newest = position[:1] - 1
        cached.write(slot, new)
        return seen[0], seen[1], torch.cat([newest - (newest - around) % slots, position])
    if new is not None:
        cached.write(slot, new)
    newest, end = position[-1:], None
    if cached.start is not None and not cached.window:
        end = cached.start + length
    elif not cached.window and position.device.type == "cpu":  # which knows the position of a step, too
        end = int(newest) + 1
    held = (newest - (newest - around) % slots)[:end]
    return *cached.read(end), held


def _rotated(vectors: Tensor, heads: Heads, position: Tensor) -> Tensor:
    """Rotate the pairs of what rotates of each head, (M, heads, dim), by the angles of positions, int64 (M,)."""
    cosines, sines = (table[position][:, None] for table in (heads.cosines, heads.sines))
    turning, fixed = vectors.float().tensor_split([2 * cosines.shape[-1]], dim=-1)
    pairs = (-1, 2) if heads.neighbours else (2, -1)
    of_pair = pairs.index(2) - 2
    one, other = turning.reshape(*turning.shape[:-1], *pairs).unbind(of_pair)
    turned = torch.stack([one * cosines - other * sines, other * cosines + one * sines], of_pair)
    return torch.cat([turned.flatten(-2), fixed], dim=-1).to(vectors.dtype)
