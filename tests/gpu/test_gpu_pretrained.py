"""Bundles on a GPU by `from_pretrained` of transformers: the model of `load_model`, and gradients through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bundle_helpers import invoke
from gpu_weights import EVERY, inputs, weight
from q6k_kernels import load_model
from q6k_kernels.generate.generator import Generator
from q6k_kernels.weights.weight import PackedWeight, linear
from tiny_chat import tiny_chat

pytestmark = pytest.mark.gpu
IDS = torch.arange(270, 310)[None]
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_chat(tmp_path_factory.mktemp("pretrained"))[0]
    assert invoke("hf", made).exit_code == 0
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS.to(model.device)).logits
    return found


@pytest.mark.parametrize("way", ["moved", "cuda", "auto"])
def test_a_bundle_opens_as_load_model_opens_it(bundle: Path, way: str, tmp_path: Path) -> None:
    if way != "moved":
        pytest.importorskip("accelerate", reason="accelerate is not installed, which device_map takes")
    options = {} if way == "moved" else {"device_map": way}
    model: Any = AutoModelForCausalLM.from_pretrained(bundle, **options)
    model = model.to("cuda")
    expected: Any = load_model(bundle, device="cuda")
    assert torch.equal(logits(model), logits(expected))
    expected.generation_config = model.generation_config  # which knows more ends of answers, by their text
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    answers = []
    for each in (model, expected):
        torch.manual_seed(0)
        answers.append(each.generate(IDS.cuda(), **options))
    assert torch.equal(*answers)
    generators = [Generator(each, capacity=128) for each in (model, expected)]
    for each in generators:
        each.prefill(IDS[0].tolist())
    found = [list(each.generate(16)) for each in generators]
    assert generators[0].fused == generators[1].fused
    assert found[0] == found[1]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", device="cuda")), logits(expected))


def test_layers_on_the_cpu_take_part(bundle: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed, which device_map takes")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), 0)
    model: Any = AutoModelForCausalLM.from_pretrained(bundle, device_map={**places, "model.layers.0": "cpu"})
    with torch.no_grad():
        found = model(IDS.cuda()).logits
    expected = logits(load_model(bundle, device="cuda"))
    assert float((found - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("m", [1, 40])
def test_gradients_of_a_product(format: str, m: int) -> None:
    made, x = weight("genuine", 272, 512, format), inputs(m, 512, BF16)
    w = PackedWeight(made.tiles, (272, 512), format)
    dy = inputs(m, 272, BF16)
    with torch.enable_grad():
        learned = x.clone().requires_grad_()
        y = linear(learned, w)
        (dx,) = torch.autograd.grad(y, learned, dy)
    assert torch.equal(y, linear(x, w, None, "bf16"))
    number = w.dequantize(BF16).double()
    exact, size = dy.double() @ number, dy.double().abs() @ number.abs()
    assert bool(((dx.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * size).all())


def test_gradients_of_a_model(bundle: Path) -> None:
    embedded = torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(0))
    found = []
    for device, dtype in (("cuda", BF16), ("cpu", torch.float32)):
        model: Any = AutoModelForCausalLM.from_pretrained(bundle, dtype=dtype).to(device)
        with torch.enable_grad():
            x = embedded.to(device, dtype).requires_grad_()
            model(inputs_embeds=x).logits.float().square().mean().backward()
        found.append(x.grad.float().cpu())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 5e-2
