"""Bundles of a few tensors, and a check of them on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gguf_builder import Builder
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.verify.device_stage import DeviceReport, check_device
from q6k_kernels.bundle import manifest as manifests

Device = Literal["auto", "cpu", "cuda"]


def bundle(path: Path, builder: Builder, scales: Literal["bf16", "exact"] = "bf16") -> Path:
    source = builder.write(path / "in.gguf")
    convert(source, path / "out", Options(scales=scales))
    return path / "out"


def check(
    directory: Path, device: Device = "cpu", progress: Callable[[int], None] = lambda _: None
) -> DeviceReport:
    return check_device(directory, manifests.read(directory), device, progress)


def packed_bytes(directory: Path) -> int:
    """Of every planar tensor, from the shapes in the manifest."""
    sizes = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2}
    arrays = [
        array
        for tensor in manifests.read(directory).tensors
        if tensor.storage == "planar"
        for array in tensor.arrays.values()
    ]
    return sum(int(np.prod(array.shape)) * sizes[array.dtype] for array in arrays)


def ql_rows(directory: Path, name: str) -> Any:
    """The rows of a tensor's ql, read by another program."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")[f"{name}.ql"]


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it
