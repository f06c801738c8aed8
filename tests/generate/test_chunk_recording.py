"""Chunks of prompts through recorded pieces: on the CPU, where pieces are run, and with stand-ins for graphs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from torch import Tensor

from dense_cases import DENSE
from families import tiny
from model_cases import MODELS, largest_difference
from q6k_kernels import load_model
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda.gemm_wgmma import plan
from q6k_kernels.generate import chunk_recording
from q6k_kernels.generate.chunk_recording import SIZES, ChunkRecorder, size_of
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_reference import TorchOperations

CPU = torch.device("cpu")
LENGTHS = (16, 11, 40, 40, 8, 12, 64, 33, 9)
"""Chunks after each other, of which the first of each size is not recorded; some fill theirs, others do not."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Watched(ChunkRecorder):
    """Puts NaN into the surplus rows of recorded chunks, and counts the chunks."""

    def __init__(self) -> None:
        super().__init__(TorchOperations(), CPU)
        self.recorded = list[int]()

    def course(self, model: Any, tokens: Tensor, layers: int) -> Any:
        for each in self._inputs.values():
            each.fill_(torch.nan)
        found = super().course(model, tokens, layers)
        if found is not None:
            self.recorded.append(len(tokens))
        return found


def held(cache: KeyValueCache) -> list[Tensor]:
    layers = [layer for layer in cache._layers if layer.keys is not None]
    kept = [each for layer in layers for each in (layer.keys, layer.values, *(layer.scales or ()))]
    return [each for each in (*kept, *cache.states.tensors) if each is not None]


def compare(model: Any, cache_type: Any = "model") -> None:
    """Compare logits and caches of chunks after each other, of two texts, with those that are not recorded."""
    total, caches = sum(LENGTHS), list[KeyValueCache]()
    recorder, texts = Watched(), 2
    steps = []
    for of_step in (recorder, None):
        caches.append(KeyValueCache(model.config, total, CPU, cache_type=cache_type))
        steps.append(Step(model, caches[-1], TorchOperations(), recorder=of_step))
    for seed in range(texts):
        ids, start = torch.randint(3, 90, (total,), generator=torch.Generator().manual_seed(seed)), 0
        for at, length in enumerate(LENGTHS):
            part, last = ids[start : start + length], at % 3 != 1
            found, expected = (step.chunk(part, start, last=last) for step in steps)
            assert (found is None) == (expected is None) == (not last)
            if found is not None and expected is not None:
                assert largest_difference(found, expected) < 1e-4
            for one, other in zip(*map(held, caches), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1 if one.dtype is torch.int8 else 1e-4)
            start += length
    again = [length for length in LENGTHS if length > 8]
    assert recorder.recorded == [11, 40, 12, 64, 33, 9, *again]
    assert sorted(recorder.made) == [16, 64]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "qwen35"])
def test_chunks_are_those_that_are_not_recorded(family: str) -> None:
    """Full attention, rings, embeddings of layers, states: none of them sees surplus rows."""
    compare(tiny(family))


@pytest.mark.parametrize("name", ["gemma4, experts", "gemma4, shared keys", "qwen3moe", "cohere2"])
def test_chunks_of_loaded_models(name: str, tmp_path: Path) -> None:
    """Mixtures, layers behind the last one that stores anything, networks beside attention."""
    out, _ = {**MODELS, **DENSE}[name].bundle(tmp_path)
    compare(load_model(out))


def test_chunks_with_a_cache_of_codes() -> None:
    compare(tiny("gemma3"), "int8")


def test_logits_of_every_token_are_not_recorded() -> None:
    recorder = Watched()
    step = Step(tiny("llama"), KeyValueCache(tiny("llama").config, 64, CPU), TorchOperations(), recorder=recorder)
    for _ in range(3):
        found = step.chunk(torch.arange(3, 19), 0, last=True, every=True)
        assert found is not None
        assert len(found) == 16
    assert not recorder.recorded


def test_sizes_are_the_next_larger_ones() -> None:
    assert [size_of(tokens) for tokens in (1, 8, 1025, 2048)] == [None] * 4
    assert [size_of(tokens) for tokens in (9, 16, 17, 65, 448, 449, 513, 1024)] == [
        *(16, 16, 32, 128, 448, 512, 640, 1024)
    ]
    assert [size_of(size) for size in SIZES] == [*SIZES]


@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (28672, 4096), (4096, 14336), (43008, 5376), (5376, 21504), (2048, 2048)]
)
def test_a_product_of_a_large_matrix_is_launched_as_for_the_tokens_themselves(n: int, k: int) -> None:
    """So results are the same to the bit, and surplus rows cost nothing."""
    hopper = device_like(90)
    for tokens in range(9, SIZES[-1] + 1):
        size = size_of(tokens)
        assert size is not None
        assert plan(tokens, n, k, hopper) == plan(size, n, k, hopper)


class Graph:
    """A graph, of which it is noted what was recorded and that it was run."""

    def __init__(self) -> None:
        self.replays, self.pool = 0, ""
        self.capturing = False

    def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.capturing, self.pool = True, pool

    def capture_end(self) -> None:
        self.capturing = False

    def replay(self) -> None:
        assert not self.capturing
        self.replays += 1


def test_pieces_become_graphs_with_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs once before, and its results are lent: replays return the same tensors."""
    made, ran = list[Graph](), list[int]()

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    cuda = SimpleNamespace(
        graph_pool_handle=lambda: "pool",
        Stream=lambda device: None,
        stream=lambda stream: nullcontext(),
        device=lambda device: nullcontext(),
        empty_cache=lambda: ran.append(-1),
        CUDAGraph=graph,
    )
    monkeypatch.setattr(chunk_recording, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(chunk_recording, "_lent", lambda tensor: tensor)

    def piece(index: int) -> Any:
        def run() -> tuple[Tensor, ...]:
            ran.append(index)
            return (torch.full((2,), index),)

        return run

    replays = chunk_recording._Graphs(CPU).of([piece(0), piece(1)])
    assert ran == [0, 1, -1, 0, 1]
    assert [each.pool for each in made] == ["pool"] * 2
    first = replays[1]()
    assert replays[1]()[0] is first[0]
    assert (ran, [each.replays for each in made]) == ([0, 1, -1, 0, 1], [0, 2])
