"""Weights of a bundle in ExecuTorch's own classes, with their codes and scales unchanged.

    weight = planar_tensor(open_bundle("out/"), "blk.0.ffn_up.weight")    # CudaDp4aPlanarInt6Tensor

A bundle's planes are ExecuTorch's planes, so nothing is encoded again. ExecuTorch has had two forms of scales:

    --scales bf16    scale bf16 (N, K/16), as in pytorch/executorch's pull request 20229
    --scales exact   scale int8 (N, K/16) and steps fp16 (N, K/256), the later form; tested with 1.5.1

Exact scales are GGUF's own numbers, so the conversion is lossless. ExecuTorch's own importer rounds scales to bf16
and then to 8-bit codes, which leaves 45 to 47 dB.

Q4_K and Q5_K become ExecuTorch's int4 and int5 classes with the bundle's codes and scales. Their mins are encoded
again (see `executorch_affine`), and a `ReencodedWarning` says what that costs: about 51 dB are left.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.errors import PackageMissingError
from q6k_kernels.export.executorch_affine import CLASSES, affine_arguments, fits
from q6k_kernels.formats.types import DEFAULT, weight_type
from q6k_kernels.weights.reader import Bundle
from q6k_kernels.weights.weight import PackedWeight

CLASS = "executorch.backends.cuda.dp4a_planar_int6_tensor.CudaDp4aPlanarInt6Tensor"
SIX_BITS = weight_type(DEFAULT).ggml
"""The GGML type of that class."""


class FormError(ValueError):
    """The installed ExecuTorch expects the other form of scales, or a tensor is no matrix that its classes hold."""


class ReencodedWarning(UserWarning):
    """A tensor differs from the GGUF's in ExecuTorch's form."""


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
    if not isinstance(weight, PackedWeight) or weight.row.ggml != SIX_BITS or len(weight.shape) != 2:
        found = f"{tuple(weight.shape)} in {bundle.info(name).type}"
        raise FormError(
            f"{bundle.path}: {name}: expected (N, K) in {SIX_BITS}, found {found}; of a stack name an expert"
        )
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
    """Return a tensor in the installed ExecuTorch's class: int6 for Q6_K, int4 for Q4_K, int5 for Q5_K.

    A `ReencodedWarning` says what is lost where the class cannot have the bundle's mins.

    Args:
        bundle: the bundle of the tensor.
        name: its GGUF name.
        device: the CPU or a CUDA GPU.
        expert: index into a stack of experts, (E, N, K).

    Raises:
        PackageMissingError: ExecuTorch, or torchao, which its class needs, is not installed.
        FormError: see `planar_arguments`; or the installed class expects another form of scales.
    """
    weight = bundle.load(name, device, expert=expert)
    if isinstance(weight, PackedWeight) and fits(weight):
        return _affine_tensor(f"{bundle.path}: {name}", weight)
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


def _affine_tensor(where: str, weight: PackedWeight) -> Tensor:
    made = planar_class(CLASSES[weight.row.bits])
    arguments = affine_arguments(weight)
    parameters = [*inspect.signature(made.__new__).parameters][1:]
    if missing := arguments.by_name.keys() - set(parameters):
        raise FormError(
            f"{where}: the installed {made.__name__} takes {', '.join(parameters)}; expected {min(missing)}, too: "
            "install an ExecuTorch whose scales and zeros have a step for each 256 weights"
        )
    if arguments.decibels < math.inf:
        words = f"its mins are encoded again for {made.__name__}, which leaves {arguments.decibels:.1f} dB"
        warnings.warn(f"{where}: {words}", ReencodedWarning, stacklevel=3)
    tensor: Tensor = made(**arguments.by_name)
    return tensor


def planar_class(path: str = CLASS) -> Any:
    """Import a class of ExecuTorch.

    Args:
        path: its module and name.

    Raises:
        PackageMissingError: ExecuTorch or torchao is not installed, or too old to have the class.
    """
    module, name = path.rsplit(".", 1)
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PackageMissingError(
            f"{path} is needed: {error}", "Install ExecuTorch and torchao: `pip install executorch`."
        ) from error
