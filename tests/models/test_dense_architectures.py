"""Architectures that are a table's row against transformers' own models: logits, decoding, the cache's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dense_cases import COHERE2, DENSE, GRANITE, OLMO3, PHI4_MINI
from model_cases import largest_difference, logits
from q6k_kernels import load_model, open_bundle
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.errors import HyperparameterError, UnsupportedModelError
from q6k_kernels.generate.generator import Generator
from q6k_kernels.models.cache_layout import cache_bytes
from tiny_gpt_oss import GPT_OSS
from tiny_models import Tiny

CPU_BYTES = 2
"""A number in the cache has four bytes on the CPU, of which `cache_bytes` tells half."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other with matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", DENSE)
def test_logits_and_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of one pass over the whole text, without a cache; in decoding, past the windows, by each step there is."""
    out, reference = DENSE[name].bundle(tmp_path)
    model: Any = load_model(out)
    assert largest_difference(logits(model), logits(reference)) < 5e-5
    ids = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference(torch.tensor([ids])).logits[0]
    for fused in (False, True):
        generator = Generator(model, capacity=32, fused=fused, chunk=8)
        assert largest_difference(generator.prefill(ids[:18]), expected[17]) < 5e-5
        for at in range(18, 21):
            generator._token.fill_(ids[at])
            assert int(generator.cache.position) == at
            if generator._fused_step is not None:
                assert largest_difference(generator._fused_step(generator._token)[0], expected[at]) < 5e-5
            with generator._our_attention():
                generator.step(generator.cache.slots)
            assert int(generator._token) == int(expected[at].argmax())
    shapes = {tensor.name: tuple(tensor.shape) for tensor in open_bundle(out).manifest.tensors}
    assert cache_bytes(read_metadata(out), shapes, 32) * CPU_BYTES == generator.cache.nbytes


@pytest.mark.parametrize(
    ("tiny", "key", "value"),
    [
        (GRANITE, "attention.scale", None),
        (GRANITE, "embedding_scale", 5.0),
        (GRANITE, "residual_scale", None),
        (GRANITE, "logit_scale", 2.0),
        (PHI4_MINI, "rope.scaling.attn_factor", None),
        (OLMO3, "attention.sliding_window", 4),
        (GPT_OSS, "expert_used_count", 3),
        (GPT_OSS, "rope.scaling.factor", 2.0),
        (COHERE2, "logit_scale", 0.5),
        (COHERE2, "attention.layer_norm_epsilon", 1e-2),
        (COHERE2, "attention.sliding_window_pattern", 2),
        (OLMO3, "attention.sliding_window_pattern", [True, True, False]),
        (OLMO3, "rope.scaling.factor", 2.0),
    ],
)
def test_every_key_has_an_effect(tiny: Tiny, key: str, value: Any, tmp_path: Path) -> None:
    """So that the agreement above is no accident of small numbers."""
    out, reference = replace(tiny, keys=tiny.keys | {key: value}).bundle(tmp_path)
    assert largest_difference(logits(load_model(out)), logits(reference)) > 1e-3


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("granite", {"rope.scaling.finetuned": False}),
        ("qwen3vl", {"rope.dimension_sections": [8, 8, 8, 8]}),
        ("smollm3", {"attention.sliding_window": 8}),
        ("gemma", {"final_logit_softcapping": 30.0}),
    ],
)
def test_keys_that_change_more_are_refused(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    tiny = DENSE[name]
    with pytest.raises((UnsupportedModelError, HyperparameterError), match=next(iter(keys))):
        load_model(replace(tiny, keys=tiny.keys | keys).bundle(tmp_path)[0])
