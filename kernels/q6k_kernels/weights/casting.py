"""Tensors that keep their dtype while their module is converted to another, by `to(dtype)`, `half` or the like.

torch converts all floating-point tensors of a module. Scales of weights and rotary frequencies stay in fp32, as
they do in a model that is loaded in another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.formats.checks import check_dtype

Change = Callable[[Tensor], Tensor]
"""What torch does to each tensor of a module that it moves or converts."""


class Castable(nn.Module):
    """A layer whose weight keeps its dtype, and whose other tensors may be bfloat16, float16 or float32.

    Attributes:
        kept: attributes of the weight's tensors.
    """

    kept: ClassVar[tuple[str, ...]] = ("tiles",)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let no tensor of the layer have a gradient.

        Raises:
            UnsupportedModelError: gradients are asked for.
        """
        if requires_grad:
            raise UnsupportedModelError(
                f"a {type(self).__name__} has packed weights, which have no gradients",
                "Train an adapter beside them, as LoRA of PEFT on linear layers.",
            )
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Change, recurse: bool = True) -> Self:
        check_dtype(converted(torch.bfloat16, fn, getattr(self, self.kept[0]).device))
        super()._apply(_keeping(fn, (getattr(self, name) for name in self.kept)), recurse)  # type: ignore[no-untyped-call]
        return self


def converted(dtype: torch.dtype, change: Change, device: torch.device) -> torch.dtype:
    """Return the dtype that tensors of a dtype have after a change."""
    return change(torch.empty(0, dtype=dtype, device=device)).dtype


def keep_dtype(module: nn.Module, *names: str) -> None:
    """Let buffers of a module, which is none of ours, keep their dtype."""
    module.__dict__["_apply"] = partial(_apply_keeping, module, names)


def _apply_keeping(module: nn.Module, names: Iterable[str], fn: Change, recurse: bool = True) -> Any:
    kept = (getattr(module, name) for name in names)
    return type(module)._apply(module, _keeping(fn, kept), recurse)  # type: ignore[no-untyped-call]


def _keeping(change: Change, tensors: Iterable[Tensor | None]) -> Change:
    """Return a change that only moves some of the tensors."""
    kept = [tensor for tensor in tensors if tensor is not None]

    def keeping(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        if changed.dtype is tensor.dtype or not any(tensor is each for each in kept):
            return changed
        return tensor.to(changed.device)

    return keeping
