"""Choose packages, device and dtype for the commands that run a model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from q6k_convert.errors import EnvironmentMissingError, UsageError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Activations = Literal["auto", "int8", "bf16"]
Weights = Literal["auto", "packed", "bytes"]
Cache = Literal["model", "int8"]
_INSTALL = "Install what models take: `pip install 'q6k-convert[inference]'`."


def check_packages(doing: str) -> None:
    """Check that torch and transformers are installed.

    Args:
        doing: what needs them, for the message.

    Raises:
        EnvironmentMissingError: a package is not installed.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise EnvironmentMissingError(f"{doing} needs {' and '.join(missing)}: not installed", _INSTALL)


def device_of(asked: Device, note: Callable[[str], None]) -> str:
    """Return the device to run on, "cpu" or "cuda".

    Raises:
        EnvironmentMissingError: "cuda" is asked for, and something that it needs is missing.
    """
    from q6k_convert.verify.device_stage import missing_for_cuda

    if asked == "cpu":
        return "cpu"
    missing = missing_for_cuda()
    if missing is None:
        return "cuda"
    if asked == "cuda":
        remedy = f"{missing.remedy} --device cpu runs on the CPU."
        raise EnvironmentMissingError(f"--device cuda cannot run: {missing.what}", remedy)
    note("on the CPU, as no GPU can be used here; `q6k-convert doctor` says why")
    return "cpu"


def dtype_of(asked: Dtype, device: str) -> torch.dtype:
    """Return the dtype of activations and of weights that are not packed.

    Raises:
        UsageError: fp32 is asked for on a GPU, whose kernels take 16 bits.
    """
    import torch

    if asked == "fp32" and device == "cuda":
        raise UsageError("--dtype fp32 is for the CPU; kernels on a GPU take 16 bits", "Give bf16 or fp16.")
    if asked == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[asked]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, like "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def described(device: torch.device) -> str:
    """Return the name of the GPU, or "the CPU"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
