"""Weights of a bundle in ExecuTorch's own classes, with their codes and scales unchanged.

    weight = planar_tensor(open_bundle("out/"), "blk.0.ffn_up.weight")    # CudaDp4aPlanarInt6Tensor

A bundle's planes are ExecuTorch's planes, so nothing is encoded again. ExecuTorch has had two forms of scales:

    --scales bf16    scale bf16 (N, K/16), as in pytorch/executorch's pull request 20229
    --scales exact   scale int8 (N, K/16) and steps fp16 (N, K/256), the later form; tested with 1.5.1

Exact scales are GGUF's own numbers, so the conversion is lossless. ExecuTorch's own importer rounds scales to bf16
and then to 8-bit codes, which leaves 45 to 47 dB.
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
    """The installed ExecuTorch expects the other form of scales, or a tensor is not a Q6_K matrix."""


@dataclass(frozen=True)
class PlanarArguments:
    """The arguments of ExecuTorch's class.

    Attributes:
        ql: low four bits of the codes, uint8 (N, K/2).
        qh: high two bits of the codes, uint8 (N, K/4).
        scale: bfloat16 scales or int8 sub-scales, (N, K/16).
        steps: scales of super-blocks, float16 (N, K/256), with int8 sub-scales; else None.
        block_size: size of a group, weights that share a scale, in each dimension.
        shape: (N, K).
    """

    ql: Tensor
    qh: Tensor
    scale: Tensor
    steps: Tensor | None
    block_size: list[int]
    shape: torch.Size

    def in_order(self) -> list[Any]:
        """Return them in the order of the constructor's parameters."""
        scales = [self.scale] if self.steps is None else [self.scale, self.steps]
        return [self.ql, self.qh, *scales, self.block_size, self.shape]


def planar_arguments(
    bundle: Bundle, name: str, device: torch.device | str | int = "cpu", *, expert: int | None = None
) -> PlanarArguments:
    """Return a Q6_K tensor in ExecuTorch's form; ExecuTorch need not be installed.

    Args:
        bundle: the bundle of the tensor.
        name: its GGUF name.
        device: the CPU or a CUDA GPU.
        expert: index into a stack of experts, (E, N, K).

    Raises:
        FormError: the tensor has another type, or is a stack and no expert is given.
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
    """Return a Q6_K tensor as the installed ExecuTorch's `CudaDp4aPlanarInt6Tensor`.

    Args:
        bundle: the bundle of the tensor.
        name: its GGUF name.
        device: the CPU or a CUDA GPU.
        expert: index into a stack of experts, (E, N, K).

    Raises:
        PackageMissingError: ExecuTorch, or torchao, which its class needs, is not installed.
        FormError: see `planar_arguments`; or the installed class expects the other form of scales.
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
    """Import ExecuTorch's class.

    Raises:
        PackageMissingError: ExecuTorch or torchao is not installed, or too old to have the class.
    """
    module, name = CLASS.rsplit(".", 1)
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PackageMissingError(
            f"{CLASS} is needed: {error}", "Install ExecuTorch and torchao: `pip install executorch`."
        ) from error
