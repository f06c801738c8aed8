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
from q6k_kernels.generate.chunk_attend_cuda import _beside
from q6k_kernels.generate.heads import Cached
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.models import cache_layout
from q6k_kernels.models.cache_layout import CHUNK, cache_bytes, prompt_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_the_size_told_is_that_of_the_cache(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one of codes also where its layers with a window have codes."""
    out, model = MODELS[name].bundle(tmp_path)
    config, metadata = model.config, read_metadata(out)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in manifest.read(out).tensors}
    for capacity, dtype in ((1, torch.bfloat16), (70, torch.bfloat16), (1000, torch.float32)):
        cache = KeyValueCache(config, capacity, CPU)
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
        states = cache.states.nbytes
        for short in (0, 1024):
            monkeypatch.setattr(cache_layout, "SHORT_WINDOW", short)
            cache = KeyValueCache(config, capacity, CPU, cache_type="int8")
            for layer, kind in enumerate(cache.kinds):
                if kind != "linear_attention":
                    attention = model.model.layers[layer].self_attn
                    heads = config.num_attention_heads // attention.num_key_value_groups
                    cache.allocate(layer, heads, attention.head_dim, dtype)
            told = cache_bytes(metadata, shapes, capacity, dtype.itemsize, codes=True)
            assert told == cache.nbytes + states, (capacity, short)


@pytest.mark.parametrize("short", [0, 1024])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4, shared keys", "qwen35"])
def test_what_a_prompt_expands_of_codes_is_told(
    tmp_path: Path, name: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most that the last chunk of a full cache takes, of all layers that hold codes."""
    monkeypatch.setattr(cache_layout, "SHORT_WINDOW", short)
    out, model = MODELS[name].bundle(tmp_path)
    config, metadata = model.config, read_metadata(out)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in manifest.read(out).tensors}
    launched = list[object]()
    for capacity in (1, 70, 2048, 4001):
        cache = KeyValueCache(config, capacity, CPU, cache_type="int8")
        rows, taken = min(capacity, CHUNK), list[int]()
        for layer, kind in enumerate(cache.kinds):
            if kind != "linear_attention":
                attention = model.model.layers[layer].self_attn
                heads = config.num_attention_heads // attention.num_key_value_groups
                cache.allocate(layer, heads, attention.head_dim, torch.bfloat16)
                if cache.scales(layer) is None:
                    continue
                window = cache.window if kind == "sliding_attention" else 0
                cached = Cached(*cache.buffers(layer), window, capacity - rows, scales=cache.scales(layer))
                both, _ = _beside(lambda *given: launched.append(given), (), cached, rows, torch.bfloat16)
                assert both is not None
                taken.append(sum(each.nbytes for each in both))
        assert prompt_bytes(metadata, shapes, capacity) == max(taken), capacity
    assert launched


def test_telling_it_needs_no_torch() -> None:
    script = "import sys, q6k_kernels.models.cache_layout; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
