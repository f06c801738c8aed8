"""What lies between the products of a decoding step, in plain torch: for the CPU, and to test the kernels by.

A step is of one token. All tensors of activations are (1, K) in the model's dtype; what is computed from them is
computed in fp32 and rounded where a layer of transformers would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from q6k_kernels.generate import sampling
from q6k_kernels.models.architecture import Activation

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ProductInput:
    """What products begin with.

    Attributes:
        halves: (1, K) in the model's dtype; None if no product wants it.
        codes: in 8 bits, as `decode.linear_of_codes` takes it; None if no product wants it.
        k: K.
    """

    halves: Tensor | None
    codes: Tensor | None
    k: int


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: `weight` float32 (K,), all that a normed value is multiplied with; `epsilon`."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> the same in fp32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


@dataclass(frozen=True)
class Heads:
    """A layer's attention.

    Attributes:
        count: query heads.
        key_heads: heads of keys and values; a divisor of `count`.
        dim: values of a head.
        scale: of scores.
        softcap: of scores, or None.
        q_norm: of each query head, `weight` (dim,), or None.
        k_norm: of each key head, likewise; with the same epsilon.
        cosines: float32 (positions, dim / 2), of rotary embeddings.
        sines: likewise.
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


@dataclass(frozen=True)
class Cached:
    """A layer's part of the cache.

    Attributes:
        keys: (1, key heads, slots, dim) in the model's dtype, contiguous.
        values: likewise.
        window: positions that are seen, of a ring of slots; 0 if all are, and slot and position are one.
    """

    keys: Tensor
    values: Tensor
    window: int


@dataclass(frozen=True)
class TokenChoice:
    """Where tokens come from and go to.

    Attributes:
        position: int64 (1,), of the last token; becomes that of the chosen one.
        token: int64 (1,), the last token; becomes the chosen one.
        chosen: int64 (positions,), tokens by position.
        seed: int64 (1,).
        temperature: 0 for the best token.
    """

    position: Tensor
    token: Tensor
    chosen: Tensor
    seed: Tensor
    temperature: float


class TorchOperations:
    """The operations of a step."""

    def supports(self, hidden: int, between: int, heads: Heads) -> str:
        """What of a model these operations are not for, in words; empty if there is nothing.

        Args:
            hidden: values between layers.
            between: values between gate and down.
            heads: of a layer.
        """
        del hidden, between, heads
        return ""

    def reserve(self, heads: Heads) -> None:
        """Takes the memory that `attend` needs: none."""

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, after: Norm | None, norm: Norm, users: list[nn.Module]
    ) -> tuple[Tensor, ProductInput]:
        """The residual sum, and its norm.

        Args:
            hidden: (1, K).
            delta: (1, K), what is added, or None.
            after: delta's own norm, or None.
            norm: of the sum.
            users: the products that follow.

        Returns:
            The sum (1, K), and its norm.
        """
        del users
        if delta is not None:
            if after is not None:
                delta = after(delta).to(hidden.dtype)
            hidden = hidden + delta
        return hidden, _plain(norm(hidden).to(hidden.dtype))

    def gate(self, gate: Tensor, up: Tensor, activation: Activation, users: list[nn.Module]) -> ProductInput:
        """The activation function of `gate` times `up`, both (1, K)."""
        del users
        x = gate.float()
        activated = silu(x) if activation == "silu" else gelu(x, approximate="tanh")
        return _plain((activated * up.float()).to(gate.dtype))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput:
        """Puts a token's key and value into the cache, and attends to what it sees there.

        Args:
            q: (1, count * dim), before norms and rotation.
            k: (1, key heads * dim), likewise.
            v: (1, key heads * dim).
            heads: the layer's.
            cached: the layer's.
            position: int64 (1,), of the token.
            users: the products that follow.

        Returns:
            (1, count * dim).
        """
        del users
        queries, key = q.view(heads.count, heads.dim), k.view(heads.key_heads, heads.dim)
        if heads.q_norm is not None:
            queries = heads.q_norm(queries).to(q.dtype)
        if heads.k_norm is not None:
            key = heads.k_norm(key).to(k.dtype)
        queries, key = (_rotated(each, heads, position) for each in (queries, key))
        slots = cached.keys.shape[-2]
        slot = position % slots
        cached.keys[0].index_copy_(1, slot, key[:, None])
        cached.values[0].index_copy_(1, slot, v.view(heads.key_heads, 1, heads.dim))
        held = position - (position - torch.arange(slots, device=q.device)) % slots
        seen = (held >= 0) & (held > position - (cached.window or slots))
        of_keys = queries.view(heads.key_heads, -1, heads.dim)
        scores = of_keys.float() @ cached.keys[0].float().transpose(1, 2) * heads.scale
        if heads.softcap is not None:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return _plain((weights @ cached.values[0].float()).to(q.dtype).view(1, -1))

    def choose(self, logits: Tensor, softcap: float | None, choice: TokenChoice) -> None:
        """The next token, see `sampling`, put where `choice` says.

        Args:
            logits: (1, V).
            softcap: of logits, or None.
            choice: how, and where to.
        """
        temperature = torch.tensor([choice.temperature], device=logits.device) if choice.temperature else None
        following = choice.position + 1
        token = sampling.choose(capped(logits, softcap), following, choice.seed, temperature)
        choice.chosen.index_copy_(0, following, token)
        choice.token.copy_(token)
        choice.position.copy_(following)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """A product, (1, N)."""
        y: Tensor = module(activations.halves)
        return y


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits in fp32, softly capped if a model does that."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _plain(x: Tensor) -> ProductInput:
    return ProductInput(x, None, x.shape[-1])


def _rotated(vectors: Tensor, heads: Heads, position: Tensor) -> Tensor:
    """(heads, dim), the halves of each rotated by the position's angles."""
    cosines, sines = (table[position].repeat(1, 2) for table in (heads.cosines, heads.sines))
    one, other = vectors.float().chunk(2, dim=-1)
    return (vectors.float() * cosines + torch.cat([-other, one], dim=-1) * sines).to(vectors.dtype)
