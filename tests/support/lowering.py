"""Follow one weight all the way: Q6_K blocks by ggml, GGUF, bundle, module, export, compilation, result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

import gguf_builder
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import PackedLinear, PackedWeight, linear, open_bundle
from q6k_kernels.export import exporting

N, K = 200, 512
LONGEST = 4096
OPERATION = "q6k.linear.default"


class Decode(nn.Module):
    """A decode-shaped module: a layer without bias."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.layer = PackedLinear.from_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Keyword(nn.Module):
    """A module of the functional form, with its bias as a keyword."""

    def __init__(self, weight: PackedWeight, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("tiles", weight.tiles)
        self.register_buffer("offset", bias)
        self.shape, self.format = weight.shape, weight.format

    def forward(self, x: Tensor) -> Tensor:
        weight = PackedWeight(self.get_buffer("tiles"), self.shape, self.format)
        return linear(x, weight, bias=self.get_buffer("offset"))


def packed(folder: Path, scales: str, device: str) -> tuple[PackedWeight, np.ndarray]:
    """Return a weight loaded from a bundle, and its dequantisation by ggml, float64 (N, K)."""
    values = np.random.default_rng(5).standard_normal((N, K)).astype(np.float32) * 0.05
    blocks = np.asarray(libgguf.quantize_rows(values, gguf_builder.Q6_K)).tobytes()
    tensor = gguf_builder.Tensor("w.weight", (N, K), gguf_builder.Q6_K, blocks)
    source = gguf_builder.Builder([tensor]).write(folder / "w.gguf")
    convert(source, folder / "out", Options(scales=scales))  # type: ignore[arg-type]
    rows = np.frombuffer(blocks, dtype=np.uint8).reshape(N, -1)
    exact = gguf.dequantize(rows, gguf.GGMLQuantizationType.Q6_K).astype(np.float64)
    weight = open_bundle(folder / "out").load("w.weight", device=device)
    assert isinstance(weight, PackedWeight)
    return weight, exact


def check(
    folder: Path, scales: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...], *, decode: bool = True
) -> None:
    """Export and compile the two modules, run them, and compare with the product of the original weight.

    Args:
        folder: folder for files.
        scales: scales of the bundle.
        device: "cpu" or "cuda".
        dtype: dtype of activations.
        sizes: values of M for the second module, on both sides of every M at which the kernel changes.
        decode: with the first module, too.
    """
    weight, exact = packed(folder, scales, device)
    random = torch.Generator().manual_seed(7)
    x = torch.randn(LONGEST, K, generator=random).to(device, dtype)
    bias = torch.randn(N, generator=random).to(device, dtype)
    rows, any_rows = x[:4], {0: Dim("M", min=2, max=LONGEST)}

    def compare(found: Any, m: int, offset: Tensor | None, eager: Tensor) -> None:
        assert found.shape == (m, N)
        assert found.dtype == dtype
        assert torch.equal(found, eager), f"not what the operation gives, at M = {m}"
        expected = x[:m].cpu().double().numpy() @ exact.T
        if offset is not None:
            expected += offset.cpu().double().numpy()
        error = np.linalg.norm(found.cpu().double().numpy() - expected) / np.linalg.norm(expected)
        assert error < 0.01, f"{error} at M = {m}"

    layer, keyword = Decode(weight).eval(), Keyword(weight, bias).eval()
    for module, shapes, tried in ((layer, None, (4,)), (keyword, (any_rows,), sizes))[0 if decode else 1 :]:
        path = folder / f"{type(module).__name__}.pt2"
        program = exporting.export_module(module, (rows.clone(),), path, dynamic_shapes=shapes)
        assert exporting.packed_operations(program) == [OPERATION]
        assert not [each for each in program.state_dict.values() if each.is_floating_point() and each.ndim > 1]
        loaded = torch._inductor.aoti_load_package(str(path))
        for m in tried:
            given = x[:m].clone()
            compare(loaded(given), m, bias if module is keyword else None, module(given))
