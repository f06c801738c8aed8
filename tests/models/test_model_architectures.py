"""Whole models against transformers' own, logit by logit, one architecture and one peculiarity after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_cases import GEMMA2, GEMMA3, IDS, MODELS, largest_difference, logits
from q6k_kernels import PackedEmbedding, PackedLinear, load_model
from q6k_kernels.weights.layers import ScaledEmbedding
from tiny_models import F16, Q3_K, Q8_0, Tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other with matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROUNDED = ("llama", "llama, tied", "qwen35moe", "gemma3", "gemma4, experts", "gemma4, experts, gate and up apart")
"""Models with every layer that holds packed weights: architectures do not know in what form their scales are."""


@pytest.mark.parametrize(
    ("name", "scales"), [*((name, "exact") for name in MODELS), *((name, "bf16") for name in ROUNDED)]
)
def test_logits_are_those_of_transformers(name: str, scales: str, tmp_path: Path) -> None:
    out, reference = MODELS[name].bundle(tmp_path, scales)
    expected = logits(reference)
    # Sums in another order: rounding of fp32, and no more.
    assert largest_difference(logits(load_model(out)), expected) < 5e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3"])
def test_the_two_scales_can_be_told_apart(name: str, tmp_path: Path) -> None:
    out, _ = MODELS[name].bundle(tmp_path, "bf16")
    (tmp_path / "exact").mkdir()
    _, exact = MODELS[name].bundle(tmp_path / "exact", "exact")
    assert largest_difference(logits(load_model(out)), logits(exact)) > 1e-3


KEYS_THAT_MATTER: list[tuple[str, str, Any]] = [
    ("llama", "attention.layer_norm_rms_epsilon", 1e-6),
    ("llama", "rope.freq_base", 1e4),
    ("llama, linear", "rope.scaling.factor", 2.0),
    ("llama, linear", "rope.scaling.type", "none"),
    ("mistral as llama", "attention.sliding_window", None),
    ("qwen2, tied, YaRN", "rope.scaling.original_context_length", 128),
    ("mistral3", "attention.temperature_scale", 0.05),
    ("mistral3", "rope.scaling.yarn_log_multiplier", None),
    ("qwen35", "rope.freq_base", 1e4),
    ("qwen35", "rope.dimension_count", 48),
    ("gemma2", "attention.sliding_window", 16),
    ("gemma2", "attn_logit_softcapping", 6.0),
    ("gemma2", "final_logit_softcapping", 4.0),
    ("gemma3", "attention.sliding_window", 16),
    ("gemma3", "rope.scaling.factor", 4.0),
    ("gemma3", "rope.freq_base", 1e6),
    ("gemma3, untied, capped", "rope.freq_base_swa", 10000.0),
    ("gemma4", "attention.sliding_window", 16),
    ("gemma4", "rope.freq_base", 1e6),
    ("gemma4", "rope.freq_base_swa", 1e5),
    ("gemma4", "final_logit_softcapping", 4.0),
    ("gemma3, untied, capped", "attention.scale", 0.125),
    ("gemma3, untied, capped", "attention.sliding_window_pattern", 1),
]


@pytest.mark.parametrize(("name", "key", "value"), KEYS_THAT_MATTER)
def test_every_key_has_an_effect(name: str, key: str, value: Any, tmp_path: Path) -> None:
    """So that the agreement above is no accident of small numbers."""
    tiny = MODELS[name]
    out, reference = replace(tiny, keys=tiny.keys | {key: value}).bundle(tmp_path)
    assert largest_difference(logits(load_model(out)), logits(reference)) > 1e-3


def test_factors_of_frequencies_have_an_effect(tmp_path: Path) -> None:
    out, reference = replace(MODELS["llama 3.1"], freqs=None).bundle(tmp_path)
    assert largest_difference(logits(load_model(out)), logits(reference)) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tensors_of_other_types_stay_as_the_file_has_them(name: str, tmp_path: Path) -> None:
    types = {"blk.0.attn_v*": Q3_K, "blk.1.ffn_up*": F16, "token_embd*": Q3_K, "blk.1.attn_q.*": Q3_K}
    out, reference = replace(MODELS[name], types=types).bundle(tmp_path)
    model: Any = load_model(out)
    assert largest_difference(logits(model), logits(reference)) < 5e-5
    first, second = model.model.layers[0], model.model.layers[1]
    assert isinstance(first.self_attn.q_proj, PackedLinear)
    assert type(first.self_attn.v_proj) is torch.nn.Linear
    assert isinstance(first.mlp.gate_up_proj, PackedLinear)
    assert isinstance(second.mlp.gate_proj, PackedLinear)
    assert type(second.mlp.up_proj) is torch.nn.Linear
    assert not isinstance(model.model.embed_tokens, PackedEmbedding)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_projections_of_several_packed_types_are_stacked_by_type(name: str, tmp_path: Path) -> None:
    types = {"blk.0.attn_v*": Q8_0, "blk.1.ffn_up*": Q8_0, "token_embd*": Q8_0}
    out, reference = replace(MODELS[name], types=types).bundle(tmp_path)
    model: Any = load_model(out)
    assert largest_difference(logits(model), logits(reference)) < 5e-5
    first, second = model.model.layers[0], model.model.layers[1]
    assert [layer.format for layer in first.self_attn.qkv_proj.layers] == ["q6_k_exact", "q8_0"]
    assert isinstance(second.self_attn.qkv_proj, PackedLinear)
    assert (second.mlp.gate_proj.format, second.mlp.up_proj.format) == ("q6_k_exact", "q8_0")  # no two to stack
    assert model.model.embed_tokens.format == "q8_0"


@pytest.mark.parametrize("name", ["llama", "mistral as llama", "qwen2", "qwen3, tied", "qwen35", "gemma3"])
def test_generated_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """With a cache, past the windows, and ids from the metadata."""
    out, reference = MODELS[name].bundle(tmp_path)
    model: Any = load_model(out)
    prompt = IDS[:1, :6]
    found, expected = (
        each.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1) for each in (model, reference)
    )
    torch.testing.assert_close(found, expected)
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(("tiny", "layers"), [(GEMMA2, 46), (GEMMA3, 62)])
def test_the_largest_gemmas_divide_scores_by_another_number(tiny: Tiny, layers: int, tmp_path: Path) -> None:
    """Of 27B: the root of hidden_size / heads, not of head_dim; the files do not say so."""
    sizes = {"hidden_size": 256, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 1}
    config = tiny.config | sizes | {"num_hidden_layers": layers, "intermediate_size": 256}
    types = {"blk.*.attn_[qkvo].*": F16, "blk.*.attn_output.*": F16, "blk.*.ffn_[gud]*": F16}
    model = replace(tiny, config=config | {"query_pre_attn_scalar": 256 // 8}, types=types)
    out, reference = model.bundle(tmp_path)
    found: Any = load_model(out)
    assert found.config.query_pre_attn_scalar == 32
    assert found.model.layers[0].self_attn.scaling == reference.model.layers[0].self_attn.scaling


def test_gemmas_embedding_is_rounded_as_in_transformers(tmp_path: Path) -> None:
    """In bf16, before it is multiplied with a rounded number and after."""
    out, reference = replace(GEMMA3, config=GEMMA3.config | {"num_hidden_layers": 1}).bundle(tmp_path)
    model: Any = load_model(out, dtype=torch.bfloat16)
    assert isinstance(model.model.embed_tokens, ScaledEmbedding)
    expected = reference.to(torch.bfloat16).model.embed_tokens(IDS)
    torch.testing.assert_close(model.model.embed_tokens(IDS), expected, rtol=0, atol=0)
