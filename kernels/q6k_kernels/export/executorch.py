"""Weights of a bundle in ExecuTorch's own classes, their codes and scales as they are.

    weight = planar_tensor(open_bundle("out/"), "blk.0.ffn_up.weight")    # CudaDp4aPlanarInt6Tensor

A bundle's planes are ExecuTorch's planes, so nothing is encoded anew. Of scales ExecuTorch has had two forms:

    --scales bf16    scale bf16 (N, K/16), as in pytorch/executorch's pull request 20229
    --scales exact   scale int8 (N, K/16) and steps fp16 (N, K/256), as since on its main branch; 1.5.1 was tried

Exact scales are GGUF's own numbers, so what is handed over is lossless. ExecuTorch's importer rounds scales to bf16
and then finds 8-bit codes for them, which leaves 45 to 47 dB.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.errors import PackageMissingError
from q6k_kernels.weights.reader import Bundle
from q6k_kernels.weights.weight import PackedWeight

CLASS = "executorch.backends.cuda.dp4a_planar_int6_tensor.CudaDp4aPlanarInt6Tensor"


class FormError(ValueError):
    """The installed ExecuTorch wants scales in the other form, or a tensor is not a matrix in Q6_K."""


@dataclass(frozen=True)
class PlanarArguments:
    """What ExecuTorch's class is made of.

    Attributes:
        ql: uint8 (N, K/2), low nibbles.
        qh: uint8 (N, K/4), high pairs of bits.
        scale: (N, K/16), bfloat16 scales, or int8 sub-scales.
        steps: float16 (N, K/256) with int8 sub-scales, else None.
        block_size: weights that share a scale, in each dimension.
        shape: (N, K).
    """

    ql: Tensor
    qh: Tensor
    scale: Tensor
    steps: Tensor | None
    block_size: list[int]
    shape: torch.Size

    def in_order(self) -> list[Any]:
        """As the class's constructor takes them."""
        scales = [self.scale] if self.steps is None else [self.scale, self.steps]
        return [self.ql, self.qh, *scales, self.block_size, self.shape]


def planar_arguments(
    bundle: Bundle, name: str, device: torch.device | str | int = "cpu", *, expert: int | None = None
) -> PlanarArguments:
    """A Q6_K tensor as ExecuTorch stores it; takes no ExecuTorch.

    Args:
        bundle: where it is.
        name: its GGUF name.
        device: the CPU or a CUDA GPU.
        expert: of a stack (E, N, K) this weight.

    Raises:
        FormError: it is no matrix in Q6_K: of another type, or a stack and no expert is given.
        KeyError, IndexError, NotLoadableError, BundleError, OSError: see `Bundle.load`.
    """
    weight = bundle.load(name, device, expert=expert)
    if not isinstance(weight, PackedWeight) or len(weight.shape) != 2:
        found = f"{tuple(weight.shape)} in {bundle.info(name).type}"
        raise FormError(f"{bundle.path}: {name}: expected (N, K) in Q6_K, found {found}; of a stack name an expert")
    planes = dict(zip(weight.row.roles, weight.planes(), strict=True))
    return PlanarArguments(
        planes["ql"],
        planes["qh"],
        planes["scale"],
        planes.get("steps"),
        [1, weight.row.group],
        torch.Size(weight.shape),
    )


def planar_tensor(
    bundle: Bundle, name: str, device: torch.device | str | int = "cpu", *, expert: int | None = None
) -> Tensor:
    """A Q6_K tensor as the installed ExecuTorch's `CudaDp4aPlanarInt6Tensor`.

    Args:
        bundle: where it is.
        name: its GGUF name.
        device: the CPU or a CUDA GPU.
        expert: of a stack (E, N, K) this weight.

    Raises:
        PackageMissingError: ExecuTorch, or torchao on which its class builds, is not installed.
        FormError: see `planar_arguments`; or the bundle's scales are not in the installed class's form.
    """
    made = planar_class()
    wants_steps = "steps" in inspect.signature(made.__new__).parameters
    arguments = planar_arguments(bundle, name, device, expert=expert)
    if wants_steps != (arguments.steps is not None):
        wanted, option = ("int8 scales and fp16 steps", "exact") if wants_steps else ("bf16 scales", "bf16")
        raise FormError(
            f"{bundle.path}: {name} is {bundle.info(name).format}, and the installed ExecuTorch wants {wanted}: "
            f"convert again with --scales {option}"
        )
    tensor: Tensor = made(*arguments.in_order())
    return tensor


def planar_class() -> Any:
    """ExecuTorch's class.

    Raises:
        PackageMissingError: it, or torchao, is not installed, or too old to have it.
    """
    module, name = CLASS.rsplit(".", 1)
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PackageMissingError(
            f"{CLASS} is needed: {error}", "Install ExecuTorch and torchao: `pip install executorch`."
        ) from error
