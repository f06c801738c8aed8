"""The operations of a decoding step in plain torch: for the CPU, and as the reference in tests of the kernels.

A step processes one token. All activations are (1, K) in the model's dtype. Computations are in fp32 and round
where a layer of transformers rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from q6k_kernels.generate import sampling
from q6k_kernels.generate.delta import DeltaHeads, delta_net
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.likelihoods import Likelihoods
from q6k_kernels.generate.mixture import Mixture, mixed
from q6k_kernels.models.architecture import Activation

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ProductInput:
    """The input of products, in one or two forms.

    Attributes:
        halves: the activations in the model's dtype, (1, K); None if no product reads them.
        codes: the activations in 8 bits, see `decode.linear_of_codes`; None if no product reads them.
        k: K.
    """

    halves: Tensor | None
    codes: Tensor | None
    k: int


@dataclass(frozen=True)
class Norm:
    """A root mean square norm with its `epsilon` and its whole factor `weight`, float32 (K,)."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of (..., K) in fp32."""
        x = x.float()
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
        q_norm: norm of each query head with `weight` (dim,), or None.
        k_norm: norm of each key head with `weight` (dim,) and the epsilon of `q_norm`, or None.
        cosines: cosines of rotary angles, float32 (positions, half the rotated values of a head): the first ones,
            all of them or fewer.
        sines: sines of rotary angles, as `cosines`.
        values_normed: whether each value head has a norm, without weights and with the epsilon of `q_norm`.
        growth: further factors of the scores by the position of the query, float32 (positions,), or None.
        gated: whether each query is followed by a gate, whose logistic function multiplies the head's output.
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


@dataclass(frozen=True)
class Cached:
    """A layer's part of the cache.

    Attributes:
        keys: (1, key heads, slots, dim) in the model's dtype, contiguous.
        values: (1, key heads, slots, dim) in the model's dtype, contiguous.
        window: size of the sliding window, whose slots are a ring; 0 for full attention, a slot for each position.
    """

    keys: Tensor
    values: Tensor
    window: int


@dataclass(frozen=True)
class TokenChoice:
    """The tensors and options of the choice of a token.

    Attributes:
        position: position of the last token, int64 (1,); advanced to that of the chosen token.
        token: the last token, int64 (1,); replaced by the chosen token.
        chosen: the tokens by position, int64 (positions,).
        seed: seed of random choices, int64 (1,).
        temperature: 0 for the best token.
        suppressed: tokens that must not be chosen, see `sampling.suppression`, or None.
        filters: what else decides, or None.
        likelihoods: where to note how likely the model finds the chosen token, or None.
    """

    position: Tensor
    token: Tensor
    chosen: Tensor
    seed: Tensor
    temperature: float
    suppressed: Tensor | None = None
    filters: Filters | None = None
    likelihoods: Likelihoods | None = None


class TorchOperations:
    """The operations of a step in plain torch."""

    def supports(self, hidden: int, between: int, heads: Heads | DeltaHeads) -> str:
        """Return why the operations do not support a model's sizes; "" if they do.

        Args:
            hidden: hidden size.
            between: size between gate and down, the intermediate size.
            heads: the heads of a layer.
        """
        del hidden, between, heads
        return ""

    def supports_experts(self, module: nn.Module, experts: int, top: int) -> str:
        """Return why the operations do not support a mixture of experts; "" if they do."""
        del module, experts, top
        return ""

    def reserve(self, heads: Heads | DeltaHeads) -> None:
        """Allocate the memory that `attend` or `delta` needs: none."""

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
    ) -> tuple[Tensor, ProductInput]:
        """Compute the residual sum and its norm.

        Args:
            hidden: the residual stream, (1, K).
            delta: the summand, (1, K), or None.
            after: norm of `delta`, or None.
            norm: norm of the sum, or None.
            users: the modules whose products read the result.
            factor: factor of the summand, after its norm.
            scale: factor of the sum, if there is a `delta`: a number of the model's dtype.

        Returns:
            The sum, (1, K), and its norm; without a norm the sum twice.
        """
        del users
        if delta is not None:
            if after is not None:
                delta = after(delta).to(hidden.dtype)
            hidden = torch.add(hidden, delta, alpha=factor) * scale
        return hidden, _plain(hidden if norm is None else norm(hidden).to(hidden.dtype))

    def gate(self, gate: Tensor, up: Tensor, activation: Activation, users: list[nn.Module]) -> ProductInput:
        """Compute the activation function of `gate` times `up`, both (rows, columns) of rows that may lie apart."""
        del users
        x = gate.float()
        activated = silu(x) if activation == "silu" else gelu(x, approximate="tanh")
        return _plain((activated * up.float()).to(gate.dtype).view(1, -1))

    def route(self, logits: Tensor, scales: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
        """Choose a token's experts.

        Args:
            logits: (1, experts).
            scales: factors of the weights, float32 (experts,), or None.
            top: number of experts to choose.

        Returns:
            The experts of the largest logits, integers (1, top), and the softmax over them, float32 (1, top).
        """
        best, chosen = logits.float().topk(top)
        weights = best.softmax(-1)
        return chosen, weights if scales is None else weights * scales[chosen]

    def experts(self, module: nn.Module, x: ProductInput, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs, (1, K)."""
        y: Tensor = module(x.halves, chosen, weights)
        return y

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput:
        """Write a token's key and value to the cache, and attend to the cache.

        Args:
            q: queries before norms and rotation, (1, count * dim), or with gates (1, count * 2 * dim).
            k: keys before norms and rotation, (1, key heads * dim); None if an earlier layer wrote them.
            v: values before norms, (1, key heads * dim); None if an earlier layer wrote them.
            heads: the heads of the layer.
            cached: the layer's part of the cache.
            position: position of the token, int64 (1,).
            users: the modules whose products read the result.

        Returns:
            (1, count * dim).
        """
        del users
        queries, *gate = q.view(heads.count, -1, heads.dim).unbind(1)
        queries = _rotated(_normed(queries, heads.q_norm), heads, position)
        slots = cached.keys.shape[-2]
        if k is not None and v is not None:
            slot = position % slots
            key, value = (each.view(heads.key_heads, heads.dim) for each in (k, v))
            key = _rotated(_normed(key, heads.k_norm), heads, position)
            if heads.values_normed and heads.q_norm is not None:
                value = _normed(value, Norm(torch.ones(heads.dim, device=v.device), heads.q_norm.epsilon))
            cached.keys[0].index_copy_(1, slot, key[:, None])
            cached.values[0].index_copy_(1, slot, value[:, None])
        held = position - (position - torch.arange(slots, device=q.device)) % slots
        seen = (held >= 0) & (held > position - (cached.window or slots))
        of_keys = queries.view(heads.key_heads, -1, heads.dim)
        scores = of_keys.float() @ cached.keys[0].float().transpose(1, 2) * heads.scale
        if heads.growth is not None:
            scores = scores * heads.growth[position]
        if heads.softcap is not None:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = (weights @ cached.values[0].float()).to(q.dtype).view(heads.count, heads.dim)
        return _plain((out * gate[0].sigmoid() if heads.gated else out).view(1, -1))

    def delta(
        self,
        mixed: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        heads: DeltaHeads,
        states: tuple[Tensor, Tensor],
        users: list[nn.Module],
    ) -> ProductInput:
        """Compute a gated delta net, see `delta.delta_net`; the products of `users` read the result."""
        del users
        return _plain(delta_net(mixed, z, b, a, heads, states))

    def supports_mixture(self, mixture: Mixture) -> str:
        """Return why the operations do not support a mixture of experts; "" if they do."""
        del mixture
        return ""

    def mix(self, x: ProductInput, mixture: Mixture, shared: Tensor | None) -> Tensor:
        """Compute a mixture of experts, see `mixture.mixed`; `x` has 16-bit values."""
        assert x.halves is not None  # noqa: S101 -- the experts are among its users
        return mixed(x.halves, mixture, shared)

    def choose(self, logits: Tensor, softcap: float | None, choice: TokenChoice) -> None:
        """Choose the next token, see `sampling`, and write it to the tensors of `choice`.

        Args:
            logits: (1, V).
            softcap: soft cap of the logits, or None.
            choice: the tensors and options.
        """
        # Filled on the device: a CUDA graph cannot record a copy from the host.
        temperature = torch.full((1,), choice.temperature, device=logits.device) if choice.temperature else None
        following, logits = choice.position + 1, capped(logits, softcap)
        token = sampling.choose(
            logits, following, choice.seed, temperature, choice.suppressed, choice.filters, choice.chosen
        )
        choice.chosen.index_copy_(0, following, token)
        choice.token.copy_(token)
        choice.position.copy_(following)
        if choice.likelihoods is not None:
            choice.likelihoods.note(logits, token, following)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Compute a product, (1, N)."""
        y: Tensor = module(activations.halves)
        return y


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits in fp32, with a soft cap if there is one."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _plain(x: Tensor) -> ProductInput:
    return ProductInput(x, None, x.shape[-1])


def _normed(vectors: Tensor, norm: Norm | None) -> Tensor:
    return vectors if norm is None else norm(vectors).to(vectors.dtype)


def _rotated(vectors: Tensor, heads: Heads, position: Tensor) -> Tensor:
    """Rotate the halves of what rotates of each head, (heads, dim), by the angles of a position, int64 (1,)."""
    cosines, sines = (table[position].repeat(1, 2) for table in (heads.cosines, heads.sines))
    turning, fixed = vectors.tensor_split([cosines.shape[-1]], dim=-1)
    one, other = turning.float().chunk(2, dim=-1)
    turned = turning.float() * cosines + torch.cat([-other, one], dim=-1) * sines
    return torch.cat([turned.to(vectors.dtype), fixed], dim=-1)
