"""What is handed to ExecuTorch: its documented layout, the bundle's own bytes, and the very weights of the GGUF."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_builder import Builder, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from q6k_kernels import open_bundle
from q6k_kernels.errors import PackageMissingError
from q6k_kernels.export.executorch import CLASS, FormError, planar_arguments, planar_tensor

N, K, EXPERTS = 5, 512, 3
MODULE = CLASS.rsplit(".", 1)[0]


@pytest.fixture(params=["bf16", "exact"])
def scales(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(path: Path, scales: str) -> Any:
    """A bundle of a matrix, a stack and a tensor of another type."""
    builder = Builder(tensors=[weight("up", (N, K)), weight("stack", (EXPERTS, N, K), seed=1)])
    builder.tensors.append(weight("norm", (K,), 0))
    convert(builder.write(path / "in.gguf"), path / "out", Options(scales=scales))  # type: ignore[arg-type]
    return open_bundle(path / "out")


def of_the_gguf(path: Path, name: str) -> np.ndarray[Any, Any]:
    reader = gguf.GGUFReader(path / "in.gguf")
    (tensor,) = (each for each in reader.tensors if each.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def codes(ql: np.ndarray[Any, Any], qh: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """q by ExecuTorch's description of its planes, a weight at a time."""
    q = np.zeros((len(ql), 2 * ql.shape[1]), dtype=np.float32)
    for n, k in np.ndindex(*q.shape):
        low = ql[n, k // 2] >> 4 * (k % 2) & 15
        chunk, word, place = k // 32, k % 32 // 8, k % 8
        high = qh[n, chunk * 8 + 4 * (place % 2) + word] >> 2 * (place // 2) & 3
        q[n, k] = int(low) + 16 * int(high) - 32
    return q


def test_planes_are_the_bundles_and_the_weights_are_the_ggufs(tmp_path: Path, scales: str) -> None:
    bundle = made(tmp_path, scales)
    found, stored = planar_arguments(bundle, "up"), load_file(tmp_path / "out" / "model.safetensors")
    for role in ("ql", "qh", "scale") if scales == "bf16" else ("ql", "qh", "scale", "steps"):
        array = getattr(found, role)
        assert array.dtype == stored[f"up.{role}"].dtype
        assert torch.equal(array.view(torch.uint8), stored[f"up.{role}"].view(torch.uint8))
    assert (found.shape, found.block_size) == (torch.Size((N, K)), [1, 16])
    assert found.in_order()[-2:] == [[1, 16], torch.Size((N, K))]
    assert len(found.in_order()) == (5 if scales == "bf16" else 6)
    scale = found.scale.float().numpy()
    if found.steps is not None:
        scale = scale * np.repeat(found.steps.float().numpy(), 16, axis=1)
    dense = codes(found.ql.numpy(), found.qh.numpy()) * np.repeat(scale, 16, axis=1)
    expected = of_the_gguf(tmp_path, "up").reshape(N, K)
    if scales == "exact":
        assert dense.tobytes() == expected.tobytes()
    else:
        assert np.abs(dense - expected).max() <= 2**-8 * np.abs(expected).max()


def test_an_expert_of_a_stack_is_a_matrix(tmp_path: Path, scales: str) -> None:
    bundle = made(tmp_path, scales)
    one, stored = planar_arguments(bundle, "stack", expert=2), load_file(tmp_path / "out" / "model.safetensors")
    assert one.shape == (N, K)
    assert torch.equal(one.ql, stored["stack.ql"][2])


@pytest.mark.parametrize("name", ["stack", "norm"])
def test_what_is_no_matrix_in_q6_k_is_named(tmp_path: Path, name: str) -> None:
    bundle = made(tmp_path, "bf16")
    with pytest.raises(FormError, match=rf"{name}: expected \(N, K\) in Q6_K, found"):
        planar_arguments(bundle, name)


def pretend(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """An ExecuTorch whose class takes these parts."""
    module = ModuleType(MODULE)
    source = f"""class CudaDp4aPlanarInt6Tensor:
    def __new__(cls, {", ".join(parts)}, block_size, shape):
        self = object.__new__(cls)
        self.given = ({", ".join(parts)}, block_size, shape)
        return self
"""
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, MODULE, module)
    for end in range(1, MODULE.count(".") + 1):
        parent = ".".join(MODULE.split(".")[:end])
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or ModuleType(parent))


@pytest.mark.parametrize("steps", [False, True])
def test_either_form_of_the_class_gets_its_own_arguments(
    tmp_path: Path, scales: str, steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "ql", "qh", "scale", *(["steps"] if steps else []))
    bundle = made(tmp_path, scales)
    if steps != (scales == "exact"):
        with pytest.raises(FormError, match=f"convert again with --scales {'exact' if steps else 'bf16'}$"):
            planar_tensor(bundle, "up")
        return
    given: Any = planar_tensor(bundle, "up")
    for one, other in zip(given.given, planar_arguments(bundle, "up").in_order(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_without_executorch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(
        PackageMissingError, match=r"CudaDp4aPlanarInt6Tensor is needed: .* `pip install executorch`"
    ):
        planar_tensor(made(tmp_path, "exact"), "up")


def test_the_published_class_dequantises_to_the_gguf_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="ExecuTorch's class builds on torchao")
    pytest.importorskip(MODULE, reason="executorch is not installed")
    tensor: Any = planar_tensor(made(tmp_path, "exact"), "up")
    dense = tensor.dequantize(torch.float32).numpy()
    assert dense.tobytes() == of_the_gguf(tmp_path, "up").reshape(N, K).tobytes()
