"""Q4_K and Q5_K in ExecuTorch's int4 and int5 classes, by the published formula, and the decibels stated."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ggml_blocks import dequantised, quantised
from q6k_kernels.errors import PackageMissingError
from q6k_kernels.export import executorch
from q6k_kernels.export.executorch import FormError, ReencodedWarning, planar_tensor
from q6k_kernels.export.executorch_affine import CLASSES, affine_arguments
from q6k_kernels.formats.blocks import decode
from q6k_kernels.formats.planes import pack
from q6k_kernels.formats.types import WEIGHT_TYPES
from q6k_kernels.weights.weight import PackedWeight

N, K = 24, 1024
TYPES = {"q4_k": 4, "q5_k": 5}


def packed(blocks: Any, format: str) -> PackedWeight:
    row = WEIGHT_TYPES[format]
    decoded = decode(blocks.reshape(-1, blocks.size // (N * K // 256)), row)
    arrays = [*pack(decoded.codes.reshape(N, K), row), *(decoded.arrays[each.role] for each in row.scales)]
    tensors = [torch.from_numpy(np.ascontiguousarray(each).reshape(N, -1).copy()) for each in arrays]
    return PackedWeight.from_planes(tensors, format)


def genuine(format: str) -> tuple[PackedWeight, Any]:
    values = np.random.default_rng(0).normal(scale=0.02, size=(N, K)).astype(np.float32)
    blocks = quantised(values, WEIGHT_TYPES[format].ggml)
    return packed(blocks, format), dequantised(blocks, WEIGHT_TYPES[format].ggml)


def dense(given: dict[str, Any]) -> Any:
    """Weights by ExecuTorch's description, a weight at a time for the codes."""
    low = given["qdata"] if "qdata" in given else given["ql"]
    codes = torch.stack([low & 15, low >> 4], dim=2).flatten(1).double().numpy()
    if "qh" in given:
        high = given["qh"].numpy()
        for n, k in np.ndindex(N, K):
            bit = k % 8 // 2 + 4 * (k % 2)
            codes[n, k] += 16 * (high[n, k // 8] >> bit & 1)
    scale, zero = (
        (given[codes_of].double() * given[step].double().repeat_interleave(8, 1)).repeat_interleave(32, 1).numpy()
        for codes_of, step in (("scale", "scale_step"), ("zero_point", "zero_point_step"))
    )
    return scale * (codes - zero)


@pytest.mark.parametrize("format", TYPES)
def test_the_weights_are_the_ggufs_but_for_the_decibels_stated(format: str) -> None:
    weight, right = genuine(format)
    found = affine_arguments(weight)
    error = dense(found.by_name) - right
    assert found.decibels == pytest.approx(
        10 * math.log10((right**2).sum(dtype=float) / (error**2).sum()), abs=0.01
    )
    assert 50 < found.decibels < 53
    planes = dict(zip(weight.row.roles, weight.planes(), strict=True))
    assert torch.equal(found.by_name["scale"], planes["scale"])
    assert torch.equal(found.by_name["scale_step"], planes["steps"])
    assert (found.by_name["block_size"], found.by_name["shape"]) == ([1, 32], torch.Size((N, K)))


@pytest.mark.parametrize("format", TYPES)
def test_mins_that_fit_lose_nothing(format: str) -> None:
    weight, _ = genuine(format)
    planes = dict(zip(weight.row.roles, weight.planes(), strict=True))
    planes["min"].zero_()
    assert affine_arguments(PackedWeight.from_planes([*planes.values()], format)).decibels == math.inf
    # A min without a scale has no zero: what it loses is counted.
    planes["min"].fill_(1)
    planes["scale"].zero_()
    assert affine_arguments(PackedWeight.from_planes([*planes.values()], format)).decibels == pytest.approx(0)


def bundle(weight: PackedWeight) -> Any:
    return SimpleNamespace(path="out", load=lambda name, device, expert: weight)


def pretend(monkeypatch: pytest.MonkeyPatch, format: str, *parts: str) -> None:
    """An ExecuTorch whose class takes these parts."""

    def make(path: str) -> Any:
        assert path == CLASSES[TYPES[format]]
        space: dict[str, Any] = {}
        exec(f"class Made:\n    def __new__(cls, {', '.join(parts)}):\n        return locals()", space)
        return space["Made"]

    monkeypatch.setattr(executorch, "planar_class", make)


@pytest.mark.parametrize("format", TYPES)
def test_the_class_gets_its_arguments_and_the_caller_the_decibels(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = genuine(format)
    pretend(monkeypatch, format, *affine_arguments(weight).by_name)
    with pytest.warns(ReencodedWarning, match=r"out: up: .* which leaves 5\d\.\d dB"):
        made: Any = planar_tensor(bundle(weight), "up")
    for name, value in affine_arguments(weight).by_name.items():
        assert torch.equal(made[name], value) if isinstance(value, torch.Tensor) else made[name] == value
    pretend(monkeypatch, format, "qdata", "ql", "qh", "scale", "zero_point", "block_size", "shape")
    with pytest.raises(FormError, match="out: up: the installed Made takes .* expected scale_step, too: install"):
        planar_tensor(bundle(weight), "up")


@pytest.mark.parametrize("format", TYPES)
def test_without_executorch_it_says_what_to_install(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CLASSES[TYPES[format]].rsplit(".", 1)[0]
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(PackageMissingError, match="is needed: .* `pip install executorch`"):
        planar_tensor(bundle(genuine(format)[0]), "up")
