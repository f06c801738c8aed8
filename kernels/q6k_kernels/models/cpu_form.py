"""The form of a model's weights on a CPU: packed, which is the reference, or a byte each, which is fast.

The packed operations unpack a weight anew for every token. A model whose weights have a byte each takes 1.1 to 1.5
bytes a weight, and multiplies with compiled code (`ops.products`). Both have exactly the same weights. The packed
operations round them to the activations' dtype, and sum products of float32 in fp64; products of bytes round no
weight and sum in fp32. So results differ in their last bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.formats.checks import Activations
from q6k_kernels.formats.types import weight_type
from q6k_kernels.models.ranks import check_whole
from q6k_kernels.ops import products
from q6k_kernels.ops.products import Bytes
from q6k_kernels.weights.byte_layers import ByteEmbedding, ByteLinear, ByteStack, bytes_of
from q6k_kernels.weights.experts import PackedStack
from q6k_kernels.weights.layers import PackedEmbedding, PackedLinear, ScaledEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = Literal["auto", "packed", "bytes"]
SHARE = 0.5
"""The most of the memory that is free which "auto" takes for weights of a byte each."""

CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Limit, use and statistics of control groups, of version 2 and 1, and the name of cached files in the last."""


def choose(
    weights: Weights, tensors: Sequence[StoredTensor], device: str, activations: Activations
) -> tuple[Literal["packed", "bytes"], str]:
    """Choose the form of a model's weights, and say why.

    Args:
        weights: "packed", "bytes", or "auto": bytes on a CPU, unless activations are to have 8 bits, or that would
            take more than half of the memory that is free, or the compiled code is not installed.
        tensors: the tensors of the bundle.
        device: type of the device.
        activations: mode of the products.

    Raises:
        ValueError: there is no such form, or "bytes" is asked for on a GPU or with activations of 8 bits.
        PackageMissingError: "bytes" is asked for, and the compiled code is not installed.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights: expected one of {', '.join(get_args(Weights))}, found {weights!r}")
    taken, free = bytes_taken(tensors), free_memory()
    sizes = f"{taken / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
    against = {
        "a GPU's kernels read packed weights": device != "cpu",
        "activations of 8 bits meet packed weights": activations == "int8",
    }
    no = next((reason for reason, holds in against.items() if holds), None)
    if weights == "bytes":
        if no:
            raise ValueError(f"weights: expected packed, found {weights!r}: {no}")
        products.check_installed()
        return "bytes", f"a byte each take {sizes}"
    if weights == "auto" and no is None:
        if not products.installed():
            return "packed", "packed, which is slow, as the compiled products are not installed"
        if taken <= SHARE * free:
            return "bytes", f"a byte each take {sizes}"
        return "packed", f"packed, which is slow, as a byte each would take {sizes}; --weights bytes takes it"
    return "packed", f"packed, as {no}" if no else "packed"


def to_bytes(model: PreTrainedModel) -> None:
    """Give the packed layers of a model weights of a byte each, one layer at a time."""
    check_whole(model, "have weights of a byte each")
    packed = (PackedLinear, PackedEmbedding, PackedStack)
    # Layers that are tied have the same tiles. All are alive here, so no two others have the same number.
    tiles = {name: id(each.tiles) for name, each in model.named_modules() if isinstance(each, packed)}
    done = dict[int, Bytes]()
    for name, key in tiles.items():
        module: Any = model.get_submodule(name)
        done[key] = done.get(key) or bytes_of(module.weight)
        model.set_submodule(name, _layer(module, done[key]))


def _layer(module: PackedLinear | PackedEmbedding | PackedStack, weight: Bytes) -> nn.Module:
    if isinstance(module, PackedLinear):
        return ByteLinear(weight, module.bias)
    if isinstance(module, PackedStack):
        return ByteStack(weight, module.count, module.bias)
    return ByteEmbedding(weight, module.dtype, module.factor if isinstance(module, ScaledEmbedding) else None)


def bytes_taken(tensors: Sequence[StoredTensor]) -> int:
    """Return the memory that the packed tensors of a bundle take with a byte for each weight."""
    total = 0
    for tensor in tensors:
        if tensor.format is not None:
            row, weights = weight_type(tensor.format), math.prod(tensor.shape)
            total += weights + weights // row.group * 4 * (1 + row.minimum)
    return total


def free_memory() -> int:
    """Return the bytes that this process may still take: what the machine has left, and its control group."""
    found = [int(line.split()[1]) * 1024 for line in _text("/proc/meminfo").splitlines() if "MemAvailable" in line]
    for limit, used, statistics, cached in CONTROL_GROUPS:
        if (most := _text(limit).strip()).isdigit() and (now := _text(used).strip()).isdigit():
            lines = (line.split() for line in _text(statistics).splitlines())
            # Files in the page cache count as used, and give way.
            found.append(int(most) - int(now) + sum(int(number) for name, number in lines if name == cached))
    return max(0, min(found, default=0))


def _text(path: str) -> str:
    """Return a file's text; none if the kernel has no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
