"""The number of weights of a model from a bundle: that of transformers' model, however they are held."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dense_cases import DENSE
from model_cases import MODELS
from q6k_kernels import load_model
from q6k_kernels.ops import products

NAMES = "llama", "qwen2", "gemma2", "gemma2, untied", "qwen35", "gemma4, experts", "gemma4, shared keys", "phi3"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """All weights, without embeddings and the heads that share them, and those that can be trained."""
    out, reference = {**MODELS, **DENSE}[name].bundle(tmp_path)
    for weights in ("packed", "bytes") if products.installed() else ("packed",):
        model = load_model(out, weights=weights)
        for each in (model, copy.deepcopy(model)):
            assert each.num_parameters() == reference.num_parameters()
            assert each.num_parameters(exclude_embeddings=True) == reference.num_parameters(exclude_embeddings=True)
            assert each.model.num_parameters() == reference.model.num_parameters()
        assert model.num_parameters(only_trainable=True) == 0
        norm = model.model.norm.weight
        norm.requires_grad_(True)
        assert model.num_parameters(only_trainable=True) == norm.numel()
