"""The operations of a pass in plain torch: for the CPU, and as the reference in tests of the kernels.

A pass processes M tokens: a decoding step one, a chunk of a prompt many. All activations are (M, K) in the model's
dtype. Computations are in fp32 and round where a layer of transformers rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from q6k_kernels.generate import sampling, text_choice
from q6k_kernels.generate.delta import DeltaHeads, delta_net
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.heads import Cached, Heads, Norm, attended
from q6k_kernels.generate.likelihoods import Likelihoods
from q6k_kernels.generate.mixture import Mixed, Mixture, mix, route
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.models.layer import Activation

if TYPE_CHECKING:
    from torch import nn


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu_squared": lambda x: relu(x).square(),
}
"""Activation functions by name."""


@dataclass(frozen=True)
class ProductInput:
    """The input of products, in one or two forms.

    Attributes:
        halves: the activations in the model's dtype, (M, K); None if no product reads them.
        codes: the activations in 8 bits, see `decode.linear_of_codes`; None if no product reads them.
        k: K.
        further: further norms of the same activations, (M, K) in the model's dtype.
        rows: M of `codes`.
    """

    halves: Tensor | None
    codes: Tensor | None
    k: int
    further: tuple[Tensor, ...] = ()
    rows: int = 1

    def part(self, rows: slice) -> ProductInput:
        """Return some tokens' of a chunk."""
        return self.changed(lambda each: each[rows])

    def changed(self, change: Callable[[Tensor], Tensor]) -> ProductInput:
        """Return the same of a chunk with each tensor changed."""
        halves = None if self.halves is None else change(self.halves)
        return ProductInput(halves, None, self.k, tuple(map(change, self.further)))


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
    """The operations of steps and chunks in plain torch."""

    def supports(self, hidden: int, between: int, heads: Heads | DeltaHeads) -> str:
        """Return why the operations do not support a model's sizes; "" if they do.

        Args:
            hidden: hidden size.
            between: size between gate and down, the intermediate size.
            heads: the heads of a layer.
        """
        del hidden, between, heads
        return ""

    def reserve(self, heads: Heads | DeltaHeads) -> None:
        """Allocate the memory that `attend` or `delta` needs: none."""

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]:
        """Compute the residual sum and its norm.

        Args:
            hidden: the residual stream, (M, K).
            delta: the summand, (M, K), or what is added up to it, or None.
            after: norm of `delta`, or None.
            norm: norm of the sum, or None.
            users: the modules whose products read the result.
            factor: factor of the summand, after its norm.
            scale: factor of the sum, if there is a `delta`: a number of the model's dtype.
            further: further norms of the sum, or None; not with a mixture's summand.

        Returns:
            The sum, (M, K), and its norm; without a norm the sum twice.
        """
        del users
        if isinstance(delta, Mixed):
            delta = delta.sum()
        if delta is not None:
            if after is not None:
                delta = after(delta).to(hidden.dtype)
            hidden = torch.add(hidden, delta, alpha=factor) * scale
        others = tuple(each(hidden).to(hidden.dtype) for each in further or ())
        return hidden, _plain(hidden if norm is None else norm(hidden).to(hidden.dtype), others)

    def gate(self, gate: Tensor, up: Tensor | None, activation: Activation, users: list[nn.Module]) -> ProductInput:
        """Compute the activation function of `gate` times `up`, both (M, K) of rows that may lie apart.

        Without `up` the result is the activation function of `gate`.
        """
        del users
        activated = ACTIVATIONS[activation](gate.float())
        gated = activated if up is None else activated * up.float()
        return _plain(gated.to(gate.dtype))

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
        """Write keys and values to the cache, and attend to the cache, see `heads.attended`."""
        del users
        return _plain(attended(q, k, v, heads, cached, position))

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

    def route(self, x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Choose the experts of tokens, see `mixture.route`."""
        return route(x, mixture)

    def mix(self, x: Tensor, mixture: Mixture, chosen: Tensor, factors: Tensor, beside: Tensor | None) -> Mixed:
        """Compute the outputs of a mixture, see `mixture.mix`."""
        return mix(x, mixture, chosen, factors, beside)

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

    def choose_of_texts(self, logits: Tensor, softcap: float | None, choice: TextsChoice) -> None:
        """Choose the next tokens of several texts, see `text_choice`; the logits are (M, V)."""
        text_choice.choose(capped(logits, softcap), choice)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Compute a product, (M, N), without the module's hooks."""
        y: Tensor = module.forward(activations.halves)
        return y


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits in fp32, with a soft cap if there is one."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _plain(x: Tensor, further: tuple[Tensor, ...] = ()) -> ProductInput:
    return ProductInput(x, None, x.shape[-1], further)
