"""Tensors beside those of a model: of encoders, left out, or too many; and what every remedy leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gguf_builder import F32, Builder, Tensor, key_value, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import load_model, open_bundle
from q6k_kernels.errors import HyperparameterError, WeightsError
from tiny_models import Q3_K, Tiny

LLAMA = Tiny("llama", "llama", {"num_hidden_layers": 2}, types={"*attn_v*": Q3_K})
ENCODERS = {"v.blk.0.attn_q.weight": (8, 256), "mm.0.weight": (4, 4), "a.conv1d.weight": (2, 3, 3)}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A model's GGUF with more tensors: those of encoders, or those that a test names."""
    write = gguf.GGUFWriter.write_header_to_file
    extra = getattr(request, "param", ENCODERS)

    def with_more(self: gguf.GGUFWriter) -> None:
        for name, shape in extra.items():
            self.add_tensor(name, np.ones(shape, np.float32))
        write(self)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_more)
    LLAMA.write(tmp_path)
    monkeypatch.undo()
    return tmp_path / "model.gguf"


def logits(bundle: Path) -> torch.Tensor:
    found: torch.Tensor = load_model(bundle)(torch.tensor([[1, 5, 9]])).logits
    return found


@pytest.mark.parametrize("options", [Options(), Options(exclude=("v.*", "mm.*")), Options(exclude=("[vma]*.*",))])
def test_a_text_model_with_encoders_beside_it_runs(source: Path, tmp_path: Path, options: Options) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    LLAMA.bundle(plain)
    convert(plain / "model.gguf", plain / "again")
    convert(source, tmp_path / "both", options)
    total = sum(tensor.nbytes for tensor in open_bundle(tmp_path / "both").manifest.tensors)
    told = list[int]()
    load_model(tmp_path / "both", progress=told.append)
    assert sum(told) == total
    assert torch.equal(logits(tmp_path / "both"), logits(plain / "again"))


EXTRA = {"blk.0.attn_sinks.weight": (8,), "blk.1.attn_sinks.weight": (8,)}


@pytest.mark.parametrize("source", [EXTRA], indirect=True)
def test_tensors_too_many_are_named_and_excluding_them_runs(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "all")
    with pytest.raises(WeightsError) as caught:
        load_model(tmp_path / "all")
    assert caught.value.cause.endswith(f"LlamaForCausalLM has not, 2 tensors: {', '.join(EXTRA)}")
    assert "convert it again with --exclude for each such tensor" in caught.value.remedy
    convert(source, tmp_path / "less", Options(exclude=tuple(EXTRA)))
    assert logits(tmp_path / "less").isfinite().all()


@pytest.mark.parametrize("options", [Options(other="raw"), Options(other="skip"), Options(exclude=("*attn_v*",))])
def test_the_remedy_for_a_tensor_left_out_runs(source: Path, tmp_path: Path, options: Options) -> None:
    convert(source, tmp_path / "less", options)
    with pytest.raises(WeightsError, match=r"blk\.0\.attn_v\.weight \(Q3_K\) is") as caught:
        load_model(tmp_path / "less")
    assert caught.value.remedy.startswith(
        "Convert the model again with --other bf16, and with no --include or --exclude"
    )
    convert(source, tmp_path / "whole", Options(other="bf16"))
    assert logits(tmp_path / "whole").isfinite().all()


@pytest.mark.parametrize("number", [42, 77])
def test_of_a_type_that_cannot_be_read_another_file_is_asked_for(tmp_path: Path, number: int) -> None:
    LLAMA.bundle(tmp_path)
    path, name = tmp_path / "model.gguf", b"output_norm.weight"
    raw = bytearray(path.read_bytes())
    at = raw.index(name) + len(name) + 4 + 8  # name, number of dimensions, the one dimension
    raw[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(raw)
    convert(path, tmp_path / "skipped", Options(other="skip"))
    with pytest.raises(WeightsError, match=r"blk\.0\.attn_v\.weight|output_norm\.weight") as caught:
        load_model(tmp_path / "skipped")
    convert(path, tmp_path / "excluded", Options(exclude=("output_norm.weight",)))
    with pytest.raises(WeightsError, match=r"output_norm\.weight \(.*\) is left out") as caught:
        load_model(tmp_path / "excluded")
    assert "another quantisation" in caught.value.remedy


def test_a_tensor_that_the_source_lacks_is_not_asked_of_another_conversion(tmp_path: Path) -> None:
    path = Builder(
        [weight("token_embd.weight", (96, 256))], [key_value("general.architecture", "llama")]
    ).write(tmp_path / "m.gguf")  # fmt: skip
    convert(path, tmp_path / "out")
    with pytest.raises(HyperparameterError) as caught:
        load_model(tmp_path / "out")
    assert "xport the model again" in caught.value.remedy


def test_a_file_that_names_thousands_of_layers_is_refused_before_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = 2_000
    sizes = {"attn_q": (512, 256), "attn_k": (128, 256), "attn_v": (128, 256), "ffn_up": (256, 256)}
    tensors = [weight("token_embd.weight", (96, 256)), *(weight(f"blk.0.{n}.weight", s) for n, s in sizes.items())]
    tensors += [Tensor(f"blk.{layer}.attn_norm.weight", (1,), F32, bytes(4)) for layer in range(layers)]
    keys = {
        "context_length": 512, "embedding_length": 256, "block_count": layers, "feed_forward_length": 256,
        "attention.head_count": 8, "attention.head_count_kv": 2, "attention.key_length": 64,
    }  # fmt: skip
    kv = [key_value("general.architecture", "llama"), *(key_value(f"llama.{k}", v) for k, v in keys.items())]
    kv += [key_value("llama.attention.layer_norm_rms_epsilon", 1e-5), key_value("llama.rope.dimension_count", 64)]
    path = Builder(tensors, kv).write(tmp_path / "m.gguf")
    convert(path, tmp_path / "out")
    built = list[int]()
    build = AutoModelForCausalLM.from_config

    def watched(config: Any, **options: Any) -> Any:
        built.append(config.num_hidden_layers)
        return build(config, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", watched)
    with pytest.raises(WeightsError, match=r"lacks \d+ tensors: ") as caught:
        load_model(tmp_path / "out")
    assert built == [1]
    assert len(caught.value.cause) < 1000
