"""A mixture of experts in a decoding step: its modules, and its computation in plain torch.

A router chooses a few experts for each token; the sum of their outputs, each with a factor, is added to that of an
expert that all tokens share, which has a gate of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Mixture:
    """The parts of a mixture beside the shared expert.

    Attributes:
        router: weights of the router and of the shared expert's gate, (experts + 1, K) in the model's dtype.
        experts: the experts, called like `weights.PackedExperts`.
        count: number of experts.
        top: number of experts that are chosen.
    """

    router: Tensor
    experts: nn.Module
    count: int
    top: int


def mixture_of(network: Any) -> Mixture:
    """Return the mixture of a network of transformers that has a router, experts, and a shared expert's gate."""
    router = torch.cat([network.gate.weight.detach(), network.shared_expert_gate.weight.detach()])
    return Mixture(router.contiguous(), network.experts, len(router) - 1, network.gate.top_k)


def mixed(x: Tensor, mixture: Mixture, shared: Tensor) -> Tensor:
    """Compute a mixture for one token.

    Args:
        x: its input, (1, K).
        mixture: the mixture.
        shared: the output of the shared expert, (1, K).

    Returns:
        (1, K).
    """
    logits = (x @ mixture.router.T)[0]
    values, chosen = logits[: mixture.count].float().softmax(-1).topk(mixture.top)
    factors = (values / values.sum()).to(x.dtype)
    routed: Tensor = mixture.experts(x, chosen[None], factors[None])
    return routed + logits[mixture.count :].sigmoid() * shared
