"""The size of a cache told from metadata alone, compared with the cache that generation makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model_cases import MODELS
from q6k_kernels.bundle import manifest
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.models.cache_layout import cache_bytes


@pytest.mark.parametrize("name", MODELS)
def test_the_size_told_is_that_of_the_cache(tmp_path: Path, name: str) -> None:
    out, model = MODELS[name].bundle(tmp_path)
    config, metadata = model.config, read_metadata(out)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in manifest.read(out).tensors}
    for capacity, dtype in ((1, torch.bfloat16), (70, torch.bfloat16), (1000, torch.float32)):
        cache = KeyValueCache(config, capacity, torch.device("cpu"))
        cache.begin_chunk(0, 1)
        for layer in range(config.num_hidden_layers):
            if cache.kinds[layer] == "linear_attention":
                channels = model.model.layers[layer].linear_attn.conv_dim
                cache.update_conv_state(torch.zeros(1, channels, 1, dtype=dtype), layer)
            elif cache.source[layer] == layer:
                attention = model.model.layers[layer].self_attn
                heads = config.num_attention_heads // attention.num_key_value_groups
                token = torch.zeros(1, heads, 1, attention.head_dim, dtype=dtype)
                cache.update(token, token, layer)
        assert cache_bytes(metadata, shapes, capacity, dtype.itemsize) == cache.nbytes, capacity
        states, cache = cache.states.nbytes, KeyValueCache(config, capacity, torch.device("cpu"), cache_type="int8")
        for layer, kind in enumerate(cache.kinds):
            if kind != "linear_attention":
                attention = model.model.layers[layer].self_attn
                heads = config.num_attention_heads // attention.num_key_value_groups
                cache.allocate(layer, heads, attention.head_dim, dtype)
        told = cache_bytes(metadata, shapes, capacity, dtype.itemsize, codes=True)
        assert told == cache.nbytes + states, capacity


def test_telling_it_needs_no_torch() -> None:
    script = "import sys, q6k_kernels.models.cache_layout; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
