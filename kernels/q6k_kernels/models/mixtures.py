"""The experts of a mixture: their tensors in a file, and the module that takes the place of transformers'.

transformers has the matrices of gate and up in one stack (E, 2 between, hidden); a file has one such stack or two.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn

from q6k_kernels.formats.checks import Activations
from q6k_kernels.weights.experts import GATES, PackedExperts
from q6k_kernels.weights.weight import PackedWeight

CLAMPED = "clamped_swiglu"
_JOINED, _PARTS = "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Names of transformers' parameters."""


class ClampedExperts(nn.Module):
    """Experts of gpt-oss that are not packed, with stacks as in a file; called as transformers' are.

    Args:
        count: E.
        hidden: inputs and outputs of an expert.
        between: rows of gate, and of up.
    """

    def __init__(self, count: int, hidden: int, between: int) -> None:
        super().__init__()
        for name, rows, columns in ((GATE_UP, 2 * between, hidden), (DOWN, hidden, between)):
            self.register_parameter(name, nn.Parameter(torch.empty(count, rows, columns), requires_grad=False))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(count, rows), requires_grad=False))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs, as `PackedExperts` does."""
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in range(len(self.get_parameter(DOWN))):
            tokens, places = torch.where(top_k_index == expert)
            gate, up = self._multiply(GATE_UP, expert, hidden_states[tokens]).chunk(2, -1)
            y = self._multiply(DOWN, expert, GATES[CLAMPED](gate, up))
            total.index_add_(0, tokens, y.float() * top_k_weights[tokens, places, None].float())
        return total.to(hidden_states.dtype)

    def _multiply(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = self.get_parameter(name), self.get_parameter(f"{name}_bias")
        return nn.functional.linear(x, weight[expert], bias[expert])


def filled_clamped(
    module: ClampedExperts,
    stacks: Sequence[PackedWeight | Tensor],
    biases: Sequence[Tensor],
    activations: Activations,
    dtype: torch.dtype,
) -> nn.Module:
    """Return a module of gpt-oss's experts with weights, packed if all of them are.

    Args:
        module: a module on the meta device.
        stacks: gate and up, or both in one, and down.
        biases: those of each stack, (E, N).
        activations: mode of the products.
        dtype: dtype of weights that are not packed.
    """
    packed = [each for each in stacks if isinstance(each, PackedWeight)]
    if len(packed) == len(stacks):
        return PackedExperts(packed[:-1], packed[-1], CLAMPED, biases, activations)
    dense = [_dense(each, dtype) for each in stacks]
    for name, stack, bias in (
        (GATE_UP, torch.cat(dense[:-1], 1), torch.cat(list(biases[:-1]), 1)),
        (DOWN, dense[-1], biases[-1]),
    ):
        setattr(module, name, nn.Parameter(stack, requires_grad=False))
        setattr(module, f"{name}_bias", nn.Parameter(bias, requires_grad=False))
    return module


def stored_parts(name: str, present: Container[str]) -> list[str]:
    """Return the names of the tensors that a file has for one: gate and up are in one stack or in two."""
    known = next((each for each in (_JOINED, _PARTS[0]) if each in name), None)
    if known is None:
        return [name]
    joined = name.replace(known, _JOINED)
    return [joined] if joined in present else [name.replace(known, part) for part in _PARTS]


def is_mixture(module: nn.Module) -> bool:
    """Check whether a module is transformers' of experts, with parameters of three dimensions."""
    stack = getattr(module, GATE_UP, None)
    return isinstance(stack, nn.Parameter) and stack.ndim == 3


def filled(
    module: nn.Module,
    load: Callable[[str], PackedWeight | Tensor],
    gate_up: Sequence[str],
    down: str,
    activation: str,
    activations: Activations,
    dtype: torch.dtype,
) -> nn.Module:
    """Return a module of experts with weights, packed if all of them are.

    Args:
        module: transformers' module, on the meta device.
        load: loads a tensor by its GGUF name.
        gate_up: the names of the stacks of gate and up, or of both in one.
        down: the name of the stack of down.
        activation: name of the activation function, see `PackedExperts`.
        activations: mode of the products.
        dtype: dtype of weights that are not packed.
    """
    first, last = [load(name) for name in gate_up], load(down)
    packed = [each for each in first if isinstance(each, PackedWeight)]
    if len(packed) == len(first) and isinstance(last, PackedWeight):
        return PackedExperts(packed, last, activation, None, activations)
    for name, stack in (
        (GATE_UP, torch.cat([_dense(each, dtype) for each in first], 1)),
        (DOWN, _dense(last, dtype)),
    ):
        setattr(module, name, nn.Parameter(stack, requires_grad=False))
    return module


def _dense(stack: PackedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    return stack.dequantize(dtype) if isinstance(stack, PackedWeight) else stack.to(dtype)
