"""Gradients through packed weights, against fp64 and transformers' own modules on the dequantised weights."""

from __future__ import annotations

import json
from typing import Any

import pytest

import any_type
from packed import weight

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from q6k_kernels import open_bundle
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.formats.types import weight_type
from q6k_kernels.models.hub_files import config as content
from q6k_kernels.models.skeleton import shapes_of
from q6k_kernels.weights import gradients
from q6k_kernels.weights.experts import PackedExperts
from q6k_kernels.weights.layers import PackedLinear
from q6k_kernels.weights.weight import PackedWeight, linear
from tiny_models import Tiny
from tiny_qwen35 import QWEN35

N, K, M = 40, 512, 5
LLAMA = Tiny("llama", "llama")


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 2**-20), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@pytest.mark.parametrize("rows", [1 << 14, 16])
def test_of_a_product(dtype: Any, error: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding of the fp64 gradient with the weights as they are in x's dtype, also some rows at a time."""
    monkeypatch.setattr(gradients, "ROWS", rows)
    packed, source = weight((N, K)), torch.Generator().manual_seed(0)
    x = torch.randn(2, M, K, generator=source).to(dtype).requires_grad_()
    bias = torch.randn(N, generator=source).requires_grad_()
    dy = torch.randn(2, M, N, generator=source).to(dtype)
    y = linear(x, packed, bias)
    y.backward(dy)
    exact = dy.double() @ packed.dequantize(dtype).double()
    size = dy.double().abs() @ packed.dequantize(dtype).double().abs()
    assert x.grad.dtype is dtype
    assert bool(((x.grad.double() - exact).abs() <= error * exact.abs() + 2**-20 * size).all())
    torch.testing.assert_close(bias.grad, dy.float().sum((0, 1)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(y, linear(x, packed, bias, "bf16"))
    layer = PackedLinear.from_weight(packed, bias)
    again = x.detach().clone().requires_grad_()
    layer(again).backward(dy)
    assert torch.equal(again.grad, x.grad)
    assert layer.tiles.grad is None


def test_of_experts() -> None:
    stacks = [
        PackedWeight.from_planes(any_type.planes(weight_type(format), n, k, (6,)), format)
        for format, n, k in (("q8_0", 64, 64), ("q5_0", 64, 32))
    ]
    theirs = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=6, hidden_size=64, moe_intermediate_size=32))
    theirs.gate_up_proj.data, theirs.down_proj.data = (each.dequantize(torch.float32) for each in stacks)
    ours = PackedExperts(stacks[:1], stacks[1], "silu")
    source = torch.Generator().manual_seed(2)
    hidden, share = torch.randn(7, 64, generator=source), torch.rand(7, 3, generator=source)
    index = torch.stack([torch.randperm(6, generator=source)[:3] for _ in range(7)])
    found = []
    for module in (ours, theirs):
        of_hidden, of_share = hidden.clone().requires_grad_(), share.clone().requires_grad_()
        module(of_hidden, index, of_share).square().sum().backward()
        found.append((of_hidden.grad, of_share.grad))
    for mine, expected in zip(*found, strict=True):
        assert (mine - expected).norm() < 1e-4 * expected.norm()


def test_activations_of_8_bits_have_none() -> None:
    packed = weight((N, K))
    with pytest.raises(ValueError, match='found "int8"'):
        linear(torch.zeros(2, K, requires_grad=True), packed, None, "int8")


@pytest.mark.parametrize(
    ("tiny", "joined"), [(LLAMA, True), (LLAMA, False), (QWEN35, True)], ids=["llama", "apart", "qwen3.5"]
)
def test_of_a_model(tiny: Any, joined: bool, tmp_path: Any) -> None:
    """Through projections that run as one, and one by one under their names in transformers."""
    bundle, reference = tiny.bundle(tmp_path)
    (bundle / "config.json").write_text(json.dumps(content(read_metadata(bundle), shapes_of(open_bundle(bundle)))))
    config = AutoConfig.from_pretrained(bundle)
    config.quantization_config["joined"] = joined
    model = AutoModelForCausalLM.from_pretrained(bundle, config=config, dtype=torch.float32)
    if tiny is LLAMA:
        assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), PackedLinear) is not joined
    embedded = torch.randn(1, 70, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for each in (model, reference):
        x = embedded.clone().requires_grad_()
        each(inputs_embeds=x).logits.square().mean().backward()
        found.append(x.grad)
    mine, expected = found
    assert (mine - expected).norm() < 1e-3 * expected.norm()
