"""The experts of a mixture: their tensors in a file, and the module that takes the place of transformers'.

transformers has the matrices of gate and up in one stack (E, 2 between, hidden); a file has one such stack or two.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn

from q6k_kernels.formats.checks import Activations
from q6k_kernels.weights.experts import PackedExperts
from q6k_kernels.weights.weight import PackedWeight

_JOINED, _PARTS = "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Names of transformers' parameters."""
SEPARATE = {
    "mlp.experts.gate_up_proj": "mlp.experts.gate_proj.weight",
    "mlp.experts.down_proj": "mlp.experts.down_proj.weight",
}
"""`Architecture.renamed` of models of which the `gguf` package knows gate and up apart only."""


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
