"""Bundles that are no model, or none that is built here: what is wrong, where, and what to do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tiny_models
from gguf_builder import Builder, key_value, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import load_model, open_bundle
from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.errors import (
    HyperparameterError,
    ModelError,
    PackageMissingError,
    UnsupportedModelError,
    WeightsError,
)
from q6k_kernels.models.filling import Filler
from q6k_kernels.models.registry import ARCHITECTURES
from tiny_models import Q3_K, Tiny

LLAMA = Tiny("llama", "llama", {"num_hidden_layers": 1})
GEMMA3 = Tiny("gemma3", "gemma3_text", {"num_hidden_layers": 1}, {"attention.sliding_window": 8})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LLAMA.bundle(tmp_path_factory.mktemp("llama"))[0]


GEMMA2 = Tiny("gemma2", "gemma2", {"num_hidden_layers": 1})
TWO_LAYERS = Tiny("llama", "llama")


def with_keys(tiny: Tiny, directory: Path, **keys: Any) -> Path:
    return replace(tiny, keys=tiny.keys | keys).bundle(directory)[0]


@pytest.mark.parametrize("name", ["rwkv7", ""])
def test_another_architecture_is_named_with_those_that_are_built(name: str, tmp_path: Path) -> None:
    keys = [key_value("general.architecture", name)] if name else []
    source = Builder([weight("token_embd.weight", (4, 256))], kv=keys).write(tmp_path / "model.gguf")
    convert(source, tmp_path / "out")
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(tmp_path / "out")
    assert f"one of {', '.join(ARCHITECTURES)}, found {repr(name) if name else 'none'}" in str(caught.value)
    assert "open_bundle" in caught.value.remedy
    assert open_bundle(tmp_path / "out").load("token_embd.weight") is not None


REQUIRED = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    out = with_keys(LLAMA, tmp_path, **{key: None})
    with pytest.raises(HyperparameterError, match=rf"metadata\.gguf: llama\.{key}: missing") as caught:
        load_model(out)
    assert "xport" in caught.value.remedy


IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("block_count", 2, "2, but the tensors are those of 1 layers"),
    ("block_count", 0, "expected 1 to 16384, found 0"),
    ("block_count", (1 << 32) - 1, "expected 1 to 16384, found 4294967295"),
    ("embedding_length", 512, "expected 256, token_embd.weight's rows, found 512"),
    ("feed_forward_length", 512, "expected 256, ffn_up's rows, found 512"),
    ("attention.head_count", 16, "16 heads of 64 (attention.key_length) are 1024 rows of attn_q, found 512"),
    ("attention.head_count", (1 << 32) - 1, "found 4294967295"),
    ("attention.head_count_kv", 3, "expected a divisor of 8 heads, found 3"),
    ("attention.head_count_kv", 16, "expected 1 to 8, found 16"),
    ("attention.head_count_kv", 4, "4 heads of 64 (attention.key_length) are 256 rows of attn_k, found 128"),
    ("attention.key_length", 32, "8 heads of 32 (attention.key_length) are 256 rows of attn_q, found 512"),
    ("attention.layer_norm_rms_epsilon", float("nan"), "found nan"),
    ("attention.layer_norm_rms_epsilon", 2.0, "found 2"),
    ("context_length", 0, "found 0"),
    ("context_length", (1 << 32) - 1, "found 4294967295"),
    ("rope.freq_base", float("inf"), "found inf"),
    ("attention.head_count", [8, 8], "expected one number, or one for each of 1 layers, found 2"),
]


@pytest.mark.parametrize(("key", "value", "problem"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_before_anything_is_built(
    key: str, value: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = with_keys(LLAMA, tmp_path, **{key: value})
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(HyperparameterError) as caught:
        load_model(out)
    assert problem in caught.value.cause
    assert key in caught.value.cause


UNKNOWN: list[tuple[Tiny, str, Any, str]] = [
    (LLAMA, "expert_count", 8, "llama.expert_count = 8"),
    (LLAMA, "attention.causal", False, "llama.attention.causal = False"),
    (LLAMA, "attention.scale", 0.5, "llama.attention.scale = 0.5"),
    (LLAMA, "final_logit_softcapping", 30.0, "llama.final_logit_softcapping = 30.0"),
    (LLAMA, "rope.dimension_sections", [16, 24, 24, 0], "llama.rope.dimension_sections"),
    (LLAMA, "rope.dimension_count", 32, "llama.rope.dimension_count differs from the 64"),
    (LLAMA, "attention.value_length", 32, "llama.attention.value_length differs from the 64"),
    (Tiny("qwen2", "qwen2", {"hidden_size": 512, "num_hidden_layers": 1}), "attention.sliding_window", 8, "= 8"),
    (GEMMA3, "attn_logit_softcapping", 50.0, "gemma3.attn_logit_softcapping"),
    (GEMMA2, "rope.freq_base_swa", 1e6, "gemma2.rope.freq_base_swa: models of gemma2 are built without it"),
    (LLAMA, "rope.freq_base_swa", 1e6, "llama.rope.freq_base_swa"),
    (LLAMA, "attention.sliding_window_pattern", 2, "llama.attention.sliding_window_pattern"),
    (LLAMA, "attention.key_length_swa", 32, "llama.attention.key_length_swa differs from the 64"),
    (TWO_LAYERS, "attention.head_count", [8, 4], "llama.attention.head_count differs between layers: 4 to 8"),
]


@pytest.mark.parametrize(("tiny", "key", "value", "problem"), UNKNOWN)
def test_what_is_not_built_is_refused(tiny: Tiny, key: str, value: Any, problem: str, tmp_path: Path) -> None:
    out = with_keys(tiny, tmp_path, **{key: value})
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(out)
    assert problem in caught.value.cause


@pytest.mark.parametrize("kind", ["longrope", "something"])
def test_other_scalings_of_rotary_embeddings_are_refused(kind: str, tmp_path: Path) -> None:
    out = with_keys(LLAMA, tmp_path, **{"rope.scaling.type": kind, "rope.scaling.factor": 4.0})
    with pytest.raises(UnsupportedModelError, match=f"expected none, linear or yarn, found '{kind}'"):
        load_model(out)


def test_keys_without_effect_are_accepted(tmp_path: Path) -> None:
    keys = {"expert_count": 0, "attention.causal": True, "rope.scaling.type": "none", "rope.scaling.factor": 8.0}
    keys |= {
        "rope.scaling.original_context_length": 64,
        "rope.scaling.finetuned": True,
        "attention.key_length_swa": 64,
    }
    load_model(with_keys(LLAMA, tmp_path, **keys))


@pytest.mark.parametrize("token", [96, (1 << 32) - 1])
def test_ids_of_special_tokens_that_the_model_does_not_have_are_left_out(token: int, tmp_path: Path) -> None:
    names = {f"tokenizer.ggml.{name}_token_id": token for name in ("bos", "eos", "padding")}
    config = load_model(with_keys(LLAMA, tmp_path, **names)).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_tokens_that_are_never_chosen_are_those_that_the_model_has(tmp_path: Path) -> None:
    key = "tokenizer.ggml.suppress_tokens"
    for at, (named, expected) in enumerate((([95, 3, 96, -1, 3], [3, 95]), ([96], None))):
        (tmp_path / str(at)).mkdir()
        config = load_model(with_keys(LLAMA, tmp_path / str(at), **{key: named})).generation_config
        assert config.suppress_tokens == expected
    (tmp_path / "x").mkdir()
    with pytest.raises(BundleError, match=r"suppress_tokens: expected an array of whole numbers, found STRING"):
        load_model(with_keys(LLAMA, tmp_path / "x", **{key: "many"}))


@pytest.mark.parametrize(
    ("tiny", "key", "value", "problem"),
    [
        (GEMMA3, "attention.scale", 0.3, "the root of a whole number"),
        (GEMMA3, "attention.sliding_window_pattern", [True, False], "one value for each of 1 layers, found 2"),
        (GEMMA3, "rope.freq_base_swa", 0.0, "rope.freq_base_swa: expected"),
    ],
)
def test_gemmas_own_keys_are_checked(tiny: Tiny, key: str, value: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError, match=problem):
        load_model(with_keys(tiny, tmp_path, **{key: value}))


def test_a_key_of_another_type_is_a_broken_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"llama\.context_length.*expected a whole number, found STRING"):
        load_model(with_keys(LLAMA, tmp_path, context_length="many"))


def test_what_transformers_refuses_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr("transformers.AutoConfig.for_model", refuse)
    with pytest.raises(UnsupportedModelError, match="transformers refuses the configuration: no such luck"):
        load_model(llama)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (Options(other="raw"), r"blk\.0\.attn_v\.weight \(Q3_K\) is stored as raw GGUF blocks"),
        (Options(other="skip"), r"blk\.0\.attn_v\.weight \(Q3_K\) is left out of the bundle"),
        (Options(exclude=("output_norm*",)), r"output_norm\.weight \(F32\) is left out of the bundle"),
    ],
)
def test_tensors_in_no_form_that_loads_are_named(options: Options, problem: str, tmp_path: Path) -> None:
    replace(LLAMA, types={"*attn_v*": Q3_K}).bundle(tmp_path)
    convert(tmp_path / "model.gguf", tmp_path / "again", options)
    with pytest.raises(WeightsError, match=problem) as caught:
        load_model(tmp_path / "again")
    assert "--other bf16" in caught.value.remedy


@pytest.mark.parametrize(
    ("tensor", "values", "problem"),
    [
        ("blk.0.attn_norm.weight", None, r"lacks the tensor blk\.0\.attn_norm\.weight"),
        ("blk.0.attn_norm.weight", np.zeros(255, np.float32), r"attn_norm\.weight: expected shape \(256,\)"),
        ("blk.0.attn_norm.weight", np.zeros(256, np.int32), "expected floating-point numbers, found I32"),
        ("blk.0.attn_v.weight", np.zeros((256, 256), np.float32), "attention.head_count_kv: 2 heads of 64"),
        ("blk.0.attn_output.weight", np.zeros((256, 513), np.float32), r"\(256, 512\), found \(256, 513\)"),
        ("output.weight", np.zeros((97, 256), np.float32), r"output\.weight: expected shape \(96, 256\)"),
        ("blk.0.attn_sinks.weight", np.zeros(8, np.float32), r"LlamaForCausalLM has not, the tensor blk"),
        ("rope_freqs.weight", np.ones(31, np.float32), r"rope_freqs\.weight: expected shape \(32,\)"),
        ("rope_freqs.weight", np.zeros(32, np.float32), r"rope_freqs\.weight: expected positive numbers"),
        ("rope_freqs.weight", np.full(32, np.nan, np.float32), r"rope_freqs\.weight: expected positive numbers"),
    ],
)  # fmt: skip
def test_missing_strange_and_misshapen_tensors_are_named(
    tensor: str, values: np.ndarray | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_tensor
    write = gguf.GGUFWriter.write_header_to_file

    def others(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if name != tensor:
            add(self, name, *args, **kwargs)

    def with_this(self: Any) -> None:
        if values is not None:
            add(self, tensor, values)
        write(self)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", others)
    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_this)
    LLAMA.write(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=problem) as caught:
        load_model(out)
    assert isinstance(caught.value, WeightsError | HyperparameterError)


def test_factors_of_frequencies_belong_to_llamas(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has not, the tensor rope_freqs.weight"):
        load_model(replace(GEMMA3, config=GEMMA3.config, freqs=[1.0] * 32).bundle(tmp_path)[0])


def test_a_part_that_nothing_fills_is_an_error_and_no_random_number(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Filler, "_rotary", lambda self: None)
    with pytest.raises(WeightsError, match=r"model\.rotary_emb\.inv_freq has no place in LlamaForCausalLM"):
        load_model(llama)


def test_transformers_has_to_be_there_and_new_enough(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.16.9")
    with pytest.raises(PackageMissingError, match=r"5\.17 or later is needed, found 5\.16\.9.*\[inference\]"):
        load_model(llama)
    monkeypatch.setattr("transformers.__version__", "10.0.0.dev0")
    load_model(llama)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PackageMissingError, match=r"5\.17 or later is needed: .*\[inference\]"):
        load_model(llama)


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "meta"},
        {"dtype": torch.float64},
        {"activations": "fp4"},
        {"device": "cuda", "dtype": torch.float32},
    ],
)
def test_other_arguments_are_refused(arguments: Any, llama: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        load_model(llama, **arguments)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_model(tmp_path)


def test_the_tiny_models_name_every_tensor_as_ggml_does() -> None:
    """A mistake there would hide one here."""
    for tiny in (LLAMA, GEMMA3):
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[tiny.architecture.upper()], 1)
        for parameter, _ in tiny.make().named_parameters():
            module, kind = parameter.rsplit(".", 1)
            assert tiny.gguf_name(parameter) == f"{names.get_name(module)}.{kind}"
    assert tiny_models.SIZES["head_dim"] * 8 != tiny_models.SIZES["hidden_size"]


def test_a_file_that_suppresses_every_token_is_refused(tmp_path: Path) -> None:
    size = tiny_models.SIZES["vocab_size"]
    keys = {"tokenizer.ggml.suppress_tokens": [*range(size), size, size]}
    path = with_keys(LLAMA, tmp_path / "all", **keys)
    with pytest.raises(BundleError, match=f"suppress_tokens: all {size} tokens are named, and none is left"):
        load_model(path)
    keys["tokenizer.ggml.suppress_tokens"] = [-1, *range(1, size + 1)]
    left = load_model(with_keys(LLAMA, tmp_path / "one", **keys))
    found = left.generate(torch.tensor([[3]]), max_new_tokens=3, do_sample=False)
    assert found.tolist() == [[3, 0, 0, 0]]
