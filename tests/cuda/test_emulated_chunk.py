"""The kernels of a prompt's chunk, emulated: sums, norms and gates against fp64, the rest against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import Tensor

import families
from chunk_cases import CASES, heads_in_chunks, nets_in_chunks, random
from cuda_emulator.memory import emulate
from families import FAMILIES, tiny
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.generate import chunk_attend_cuda
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.chunk_recording import ChunkRecorder
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = cuda_emulator.requires_compiler
CPU = torch.device("cpu", 0)
SIZES = {
    "head_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MORE = {
    "gemma4": {"global_head_dim": 128},
    "qwen35": {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "hidden_size": 128},
}
Make = Callable[[torch.dtype], ChunkKernels]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    memory = emulate(monkeypatch, device_like(90))
    yield lambda dtype: ChunkKernels(CPU, dtype, Kernels(CPU, dtype))
    memory.check()


def normed(x: Tensor, norm: Norm) -> Tensor:
    x = x.double() - (x.double().mean(-1, keepdim=True) if norm.centred else 0)
    return x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight.double()


@pytest.mark.parametrize(
    ("dtype", "k", "with_delta", "with_after", "with_norm"),
    [
        (torch.bfloat16, 96, True, True, True),
        (torch.bfloat16, 1056, False, False, True),
        (torch.bfloat16, 5376, True, True, True),
        (torch.bfloat16, 5376, True, False, False),
    ],
)
def test_sums_and_norms_of_rows(
    make: Make, dtype: torch.dtype, k: int, with_delta: bool, with_after: bool, with_norm: bool
) -> None:
    hidden, delta = (3 * random(3, k)).to(dtype), random(3, k, seed=1).to(dtype)
    norm, after = (Norm(1 + random(k, seed=seed) / 4, 1e-3, centred=k == 1056) for seed in (2, 3))
    total, x = make(dtype).add_norm(
        *(hidden, delta if with_delta else None, after if with_after else None, norm if with_norm else None),
        *([], 0.25, 0.5),
    )
    expected = hidden.double()
    if with_delta:
        added = normed(delta, after).to(dtype) if with_after else delta
        expected = (expected + 0.25 * added.double()) * 0.5
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}
    torch.testing.assert_close(total.double(), expected, **close)
    assert x.halves is not None
    torch.testing.assert_close(x.halves.double(), normed(total, norm) if with_norm else expected, **close)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu_squared"])
def test_gates_are_halves_of_a_product(make: Make, activation: Any) -> None:
    gate, up = (4 * random(3, 2 * 1040)).bfloat16().split(1040, -1)
    x = gate.double()
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    share = {"silu": x.sigmoid(), "gelu_tanh": (1 + inner.tanh()) / 2, "relu_squared": x.clamp(min=0)}[activation]
    for factor in (up, None):
        found = make(torch.bfloat16).gate(gate, factor, activation, []).halves
        assert found is not None
        expected = x * share * (1 if factor is None else up.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("dim", "group", "window", "rotated", "more"), CASES)
def test_heads_in_chunks(
    make: Make, dim: int, group: int, window: int, rotated: int, more: dict[str, Any], monkeypatch: Any
) -> None:
    """Chunks after each other, of which the second wraps a ring and the third is longer than one."""
    monkeypatch.setattr(chunk_attend_cuda, "SCORES_AT_ONCE", 2 * group * 40 * 5)  # some five queries at a time
    heads_in_chunks(make(torch.float16), torch.float16, "cpu", dim, group, window, rotated, more)


@pytest.mark.parametrize(
    ("family", "recorded"),
    [("gemma2", False), ("gemma4", False), ("gemma4", True), ("qwen35", False), ("qwen35", True)],
)
def test_logits_are_those_in_torch(family: str, recorded: bool, monkeypatch: Any) -> None:
    """Of chunks of which the second wraps rings of 72 slots, and may be recorded, and the last has one token."""
    name = FAMILIES[family][0]
    made = getattr(families.transformers, f"{name}Config")

    def config(**given: Any) -> Any:
        return made(**{**given, **SIZES, **MORE.get(family, {}), "initializer_range": 0.1})

    # As `families` has it: a test before may have had transformers imported anew.
    monkeypatch.setattr(families.transformers, f"{name}Config", config)
    model = tiny.__wrapped__(family).to(torch.float16)
    ids = torch.randint(0, 97, (107,), generator=torch.Generator().manual_seed(0))
    reference = Step(model, KeyValueCache(model.config, 120, CPU), TorchOperations())
    memory = emulate(monkeypatch, device_like(90))
    steps = Kernels(CPU, torch.float16)
    recorder = ChunkRecorder(ChunkKernels(CPU, torch.float16, steps, recorded=True), CPU) if recorded else None
    of_chunks = ChunkKernels(CPU, torch.float16, steps)
    step = Step(model, KeyValueCache(model.config, 120, CPU), steps, of_chunks, recorder=recorder)
    start = 0
    for end in (60, 106, 107):
        found, expected = (each.chunk(ids[start:end], start, last=True) for each in (step, reference))
        assert found is not None
        assert expected is not None
        assert float((found - expected).abs().max() / expected.std()) < 0.03
        start = end
    assert recorder is None or [*recorder.made] == [64]
    assert step.chunk(ids[:2], start, last=False) is None
    memory.check()


@pytest.mark.parametrize("tiled", [True, False])
def test_delta_nets_in_chunks(make: Make, tiled: bool) -> None:
    nets_in_chunks(make(torch.float16), torch.float16, "cpu", tiled)
