"""PackedExperts: the experts of a mixture on packed stacks, in place of transformers' modules with 3-D parameters.

    experts = PackedExperts([gate, up], down, "silu")
    y = experts(hidden, top_k_index, top_k_weights)

transformers' Qwen3MoeExperts, Qwen3_5MoeExperts, Gemma4TextExperts and GptOssExperts are called with these
arguments. The router stays the model's own. No expert is expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from q6k_kernels.formats.checks import Activations, check_activations
from q6k_kernels.ops import grouped
from q6k_kernels.weights import gradients
from q6k_kernels.weights.casting import Castable
from q6k_kernels.weights.weight import PackedWeight, check_packed, check_width

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Constants of gpt-oss's gate: the factor in its sigmoid, and the bound of gate and up."""


def _gated(function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return function(gate) * up


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": partial(_gated, silu),
    "gelu_tanh": partial(_gated, partial(gelu, approximate="tanh")),
    "clamped_swiglu": _clamped_swiglu,
}
"""Activation's name -> function of gate and up."""


class PackedStack(Castable):
    """A stack of linear layers (E, N, K) of which each row of activations meets some.

    Args:
        weight: (E, N, K).
        bias: bfloat16, float16 or float32 (E, N), on the weight's device, or None.
        activations: "auto", "int8" or "bf16", see `q6k_kernels.linear`.

    Raises:
        TypeError: the weight is a dense tensor.
        ValueError: the weight is no stack, or a bias of another shape or device.
    """

    tiles: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, activations: Activations = "auto") -> None:
        check_packed(weight)
        check_activations(activations)
        if len(weight.shape) != 3:
            raise ValueError(f"weight: expected a stack (E, N, K), found {weight.shape}")
        if bias is not None and (bias.shape != weight.shape[:2] or bias.device != weight.device):
            raise ValueError(
                f"bias: expected {weight.shape[:2]} on {weight.device}, found {tuple(bias.shape)} on {bias.device}"
            )
        super().__init__()
        self.count, self.out_features, self.in_features = weight.shape
        self.format, self.activations = weight.format, activations
        self.tiles = weight.parameter()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> PackedWeight:
        """The stack; shares the module's parameter."""
        return PackedWeight(self.tiles, (self.count, self.out_features, self.in_features), self.format)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Multiply each row with the weights of its experts.

        Args:
            x: (M, K), the same row for all experts of a token, or (M, top, K).
            experts: int64 or int32 (M, top).

        Returns:
            (M, top, N) of x's dtype.
        """
        check_width(x, self.in_features)
        product = gradients.experts if gradients.wanted(x, self.bias) else grouped.experts
        return product(x, self.tiles, experts, self.bias, self.out_features, self.format, self.activations)

    def extra_repr(self) -> str:
        """Return the text between the brackets of `repr`."""
        shape = f"{self.count}, out_features={self.out_features}, in_features={self.in_features}"
        return f"{shape}, bias={self.bias is not None}, format={self.format!r}, activations={self.activations!r}"


class PackedExperts(nn.Module):
    """All experts of a layer: gate and up, an activation, down, and the weighted sum.

    Args:
        gate_up: one stack with the rows of gate, then those of up; or two stacks, gate and up, which become one
            where their weight types and numbers of rows let them.
        down: the stack (E, hidden, between).
        activation: a name in `GATES`.
        biases: biases of gate_up in the same order, then of down; or None.
        activations: "auto", "int8" or "bf16", see `q6k_kernels.linear`.

    Raises:
        TypeError: a weight is a dense tensor.
        ValueError: shapes do not agree, or there is no such activation.
    """

    def __init__(
        self,
        gate_up: Sequence[PackedWeight],
        down: PackedWeight,
        activation: str,
        biases: Sequence[Tensor] | None = None,
        activations: Activations = "auto",
    ) -> None:
        if activation not in GATES:
            raise ValueError(f"activation: expected one of {', '.join(GATES)}, found {activation!r}")
        for weight in (*gate_up, down):
            check_packed(weight)
        between = sum(weight.shape[-2] for weight in gate_up) // 2
        shapes = [weight.shape for weight in (*gate_up, down)]
        count, hidden = down.shape[0], down.shape[-2]
        rows = [2 * between] if len(gate_up) == 1 else [between] * 2
        if shapes != [*((count, each, hidden) for each in rows), (count, hidden, between)]:
            raise ValueError(
                f"expected gate and up (E, between, hidden), or both in one stack (E, 2 between, hidden), and down "
                f"(E, hidden, between); found {', '.join(map(str, shapes))}"
            )
        of_parts: list[Tensor | None] = list(biases) if biases is not None else [None] * len(shapes)
        if len(of_parts) != len(shapes):
            raise ValueError(f"biases: expected {len(shapes)}, one for each stack, found {len(of_parts)}")
        super().__init__()
        *first, last = of_parts
        weights = list(gate_up)
        if len(weights) == 2 and weights[0].format == weights[1].format and between % 16 == 0:
            weights = [PackedWeight.cat(weights)]
            first = [None if first[0] is None else torch.cat(cast("list[Tensor]", first), 1)]
        self.activation, self.between = activation, between
        self.gate_up = nn.ModuleList(
            PackedStack(weight, bias, activations) for weight, bias in zip(weights, first, strict=True)
        )
        self.down = PackedStack(down, last, activations)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs.

        Args:
            hidden_states: (M, hidden).
            top_k_index: int64 or int32 (M, top), each 0 to E-1.
            top_k_weights: float (M, top).

        Returns:
            (M, hidden) of the dtype of `hidden_states`, to which weights are rounded, too; the sum is in fp32.
        """
        both = [stack(hidden_states, top_k_index) for stack in self.gate_up]
        gate, up = both if len(both) == 2 else both[0].split(self.between, -1)
        out = self.down(GATES[self.activation](gate, up), top_k_index)
        # As batches: a copy of all outputs in fp32 would take gigabytes for long prompts.
        return torch.bmm(top_k_weights.to(out.dtype).unsqueeze(1), out).squeeze(1)
