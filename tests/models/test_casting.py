"""Models whose dtype is changed after loading: the same, bit for bit, as those that are loaded in that dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_cases import MODELS, logits
from q6k_kernels import PackedEmbedding, PackedLinear, load_model
from q6k_kernels.errors import UnsupportedModelError
from tiny_models import F32

CASES = {
    **{name: MODELS[name] for name in ("llama, biases", "gemma3", "qwen35moe")},
    "gemma3, embedding not packed": replace(MODELS["gemma3"], types={"token_embd.weight": F32}),
}
CONVERSIONS: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "to": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "to device and dtype": (torch.float16, lambda model: model.to("cpu", torch.float16)),
    "half": (torch.float16, lambda model: model.half()),
    "bfloat16": (torch.bfloat16, lambda model: model.bfloat16()),
    "type": (torch.float16, lambda model: model.type(torch.float16)),
    "float": (torch.float32, lambda model: model.float()),
}


@pytest.mark.parametrize(
    ("name", "weights"),
    [("gemma3", "packed"), ("qwen35moe", "packed"), *((name, "bytes") for name in CASES if name != "gemma3")],
)
def test_a_model_of_another_dtype_is_that_which_is_loaded_so(name: str, weights: Any, tmp_path: Path) -> None:
    out, _ = CASES[name].bundle(tmp_path)
    model = load_model(out, weights=weights, dtype=torch.float32)
    before = {key: each.dtype for key, each in model.state_dict().items() if not each.is_floating_point()}
    model.to(torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert torch.equal(logits(model), logits(load_model(out, weights=weights, dtype=torch.bfloat16)))
    assert before.items() <= {key: each.dtype for key, each in model.state_dict().items()}.items()


@pytest.mark.parametrize("weights", ["packed", "bytes"])
def test_every_conversion_of_torch_is_understood(weights: Any, tmp_path: Path) -> None:
    out, _ = CASES["gemma3"].bundle(tmp_path)
    model: Any = load_model(out, weights=weights, dtype=torch.float32)
    for name, (dtype, convert) in CONVERSIONS.items():
        convert(model)
        assert model.model.embed_tokens(torch.tensor([1])).dtype is model.dtype is dtype, name


@pytest.mark.parametrize("layer", [PackedLinear(256, 16, bias=True), PackedEmbedding(16, 256)])
def test_what_no_packed_layer_can_become_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected bfloat16, float16 or float32, found torch.float64"):
        layer.double()
    with pytest.raises(UnsupportedModelError, match="packed weights, which have no gradients. Train an adapter"):
        layer.requires_grad_(True)
    assert not layer.requires_grad_(False).tiles.requires_grad
