"""A mixture of experts in a step or a chunk: its modules, and its computation in plain torch.

A router chooses a few experts for each token; the result is the sum of their outputs, each with a factor: the
softmax of the chosen experts' logits. Some models add a network beside the experts: one that all tokens share, with
a gate of its own, or one with norms of its own. The sum is left to the residual sum that follows, see `Mixed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from q6k_kernels.generate.heads import Norm
from q6k_kernels.models.ranks import SpreadExperts, summed


@dataclass(frozen=True)
class MixtureNorms:
    """The norms around a mixture whose router and experts see the residual stream itself.

    Attributes:
        router: norm of what the router sees.
        experts: norm of what the experts see.
        after_experts: norm of the experts' sum.
        after_beside: norm of the result of the network beside them.
    """

    router: Norm
    experts: Norm
    after_experts: Norm
    after_beside: Norm


@dataclass(frozen=True)
class Mixture:
    """A mixture; the network beside it is no part of it.

    Attributes:
        router: weights of the router, (experts, K) in the model's dtype; in a last row those of the gate of the
            network beside, if it has one.
        experts: the experts, called like `weights.PackedExperts`.
        count: number of experts.
        top: number of experts that are chosen.
        scales: further factors of the experts, float32 (experts,), or None.
        norms: its norms, or None: then router and experts see what the network does.
        bias: biases of the rows of `router`, (rows,) in its dtype, or None.
        spread: of experts that are divided among ranks, which are here; None if all are.
    """

    router: Tensor
    experts: nn.Module
    count: int
    top: int
    scales: Tensor | None = None
    norms: MixtureNorms | None = None
    bias: Tensor | None = None
    spread: SpreadExperts | None = None


@dataclass(frozen=True)
class Mixed:
    """The result of a mixture: outputs that are not added up yet.

    Attributes:
        rows: outputs of experts, (M, rows, K).
        factors: their factors, float32 (M, rows); that of `beside` after them, if it has one.
        beside: output of the network beside the experts, (M, K), or None.
        norms: the mixture's norms, or None.
    """

    rows: Tensor
    factors: Tensor
    beside: Tensor | None
    norms: MixtureNorms | None

    @property
    def gated(self) -> bool:
        """Whether `beside` has a factor."""
        return self.factors.shape[1] > self.rows.shape[1]

    def sum(self) -> Tensor:
        """Add up, (M, K)."""
        count, dtype = self.rows.shape[1], self.rows.dtype
        total, beside = self._of_experts(), self.beside
        if self.norms is not None:
            total = self.norms.after_experts(total).to(dtype)
            beside = None if beside is None else self.norms.after_beside(beside).to(dtype)
        if beside is not None and self.gated:
            beside = self.factors[:, count:].to(dtype) * beside
        return total if beside is None else total + beside

    def over_ranks(self) -> Mixed:
        """Return the result of the experts of all ranks: one row a token, their sum."""
        return _of_sum(summed(self._of_experts()), self.factors[:, self.rows.shape[1] :], self.beside, self.norms)

    def _of_experts(self) -> Tensor:
        """Add up the outputs of experts, (M, K)."""
        factors = self.factors[:, None, : self.rows.shape[1]]
        return torch.bmm(factors, self.rows.float())[:, 0].to(self.rows.dtype)


def _of_sum(total: Tensor, gates: Tensor, beside: Tensor | None, norms: MixtureNorms | None) -> Mixed:
    """Return the result of a mixture whose experts' outputs are added up."""
    return Mixed(total[:, None], torch.cat([gates.new_ones(len(total), 1), gates], 1), beside, norms)


def route(x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Choose the experts of tokens.

    Args:
        x: what the router sees, (M, K).
        mixture: the mixture.

    Returns:
        The experts of the largest logits, integers (M, top), and their factors, float32 (M, top), of numbers of the
        model's dtype; behind them that of the network beside, if it has a gate.
    """
    logits = linear(x, mixture.router, mixture.bias)
    values, chosen = logits[:, : mixture.count].float().topk(mixture.top)
    factors = values.softmax(-1)
    if mixture.scales is not None:
        factors = factors * mixture.scales[chosen]
    return chosen, torch.cat([factors.to(x.dtype), logits[:, mixture.count :].sigmoid()], 1).float()


def mix(x: Tensor, mixture: Mixture, chosen: Tensor, factors: Tensor, beside: Tensor | None) -> Mixed:
    """Compute the outputs of the chosen experts: here one row a token, their sum.

    Args:
        x: what the experts see, (M, K).
        mixture: the mixture.
        chosen: the experts, from `route`.
        factors: their factors, from `route`.
        beside: output of the network beside them, (M, K), or None.
    """
    total: Tensor = mixture.experts(x, chosen, factors[:, : mixture.top])
    return _of_sum(total, factors[:, mixture.top :], beside, mixture.norms)
