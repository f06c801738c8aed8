"""A mixture of experts in a step or a chunk: its modules, and its computation in plain torch.

A router chooses a few experts for each token; the result is the sum of their outputs, each with a factor. Some
models add the output of an expert that all tokens share, which has a gate of its own.
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
        router: weights of the router, (experts, K) in the model's dtype; of the shared expert's gate in a last row.
        experts: the experts, called like `weights.PackedExperts`.
        count: number of experts.
        top: number of experts that are chosen.
    """

    router: Tensor
    experts: nn.Module
    count: int
    top: int


def mixture_of(network: Any) -> Mixture:
    """Return the mixture of a network of transformers: a router, experts, perhaps a shared expert's gate."""
    router, count = network.gate.weight.detach(), len(network.gate.weight)
    if (shared := getattr(network, "shared_expert_gate", None)) is not None:
        router = torch.cat([router, shared.weight.detach()])
    return Mixture(router.contiguous(), network.experts, count, network.gate.top_k)


def mixed(x: Tensor, mixture: Mixture, shared: Tensor | None) -> Tensor:
    """Compute a mixture.

    Args:
        x: its input, (M, K).
        mixture: the mixture.
        shared: the output of the shared expert, (M, K), or None.

    Returns:
        (M, K).
    """
    logits = x @ mixture.router.T
    values, chosen = logits[:, : mixture.count].float().softmax(-1).topk(mixture.top)
    factors = (values / values.sum(-1, keepdim=True)).to(x.dtype)
    routed: Tensor = mixture.experts(x, chosen, factors)
    return routed if shared is None else routed + logits[:, mixture.count :].sigmoid() * shared
