"""Several decoding steps in one CUDA graph: the same, to the bit, as one by one, however often they are run."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("libgguf")

from torch import Tensor

from model_cases import MODELS
from q6k_kernels import load_model
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.recording import TOGETHER
from q6k_kernels.generate.step_cuda import Kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["llama 3.1", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_several_steps_in_a_graph(name: str, temperature: float, tmp_path: Path) -> None:
    """Tokens, keys and values are those of steps one by one, to the bit, however often and however many are run."""
    out, _ = MODELS[name].bundle(tmp_path)
    model = load_model(out, device="cuda", dtype=torch.bfloat16)
    prompt, most = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(0)).tolist(), 301
    generator = Generator(model, capacity=21 + most, temperature=temperature, seed=3)
    slots, layers = generator.cache.slots, range(model.config.num_hidden_layers)

    def cached() -> list[Tensor]:
        return [part for layer in layers for part in generator.cache.buffers(layer)]

    generator.prefill(prompt)
    after_prompt = [part.clone() for part in cached()]

    def begin() -> None:
        generator.reset()
        generator.prefill(prompt)
        for part, before in zip(cached(), after_prompt, strict=True):
            part.copy_(before)  # nothing of an earlier answer

    tokens = [int(generator._token)]
    for _ in range(most - 1):
        generator.step(slots)
        tokens.append(int(generator._token))
    expected = [part.clone() for part in cached()]
    for repeat in range(20):
        begin()
        if repeat % 2:
            generator.prepare(most)
        assert list(generator.generate(most)) == tokens
        assert all(torch.equal(found, right) for found, right in zip(cached(), expected, strict=True))
    assert set(generator._recorder.made) == {(slots, 1), (slots, TOGETHER)}
    for count in (1, 2, 8, 15, 16, 17, 23, 24, 25, 100):
        begin()
        assert list(generator.generate(count)) == tokens[:count]
    for end in (3, 8, 12, 16, 40, 200):
        begin()
        stop = tokens[end]
        assert list(generator.generate(most, stop={stop})) == tokens[: tokens.index(stop)]
        assert generator.length == 21 + tokens.index(stop) + 1
    assert not run_of(generator)._counted.any()


def run_of(generator: Generator) -> Kernels:
    assert generator._fused_step is not None
    operations = generator._fused_step._operations
    assert isinstance(operations, Kernels)
    return operations


def test_several_steps_neither_wait_nor_allocate(tmp_path: Path) -> None:
    out, _ = MODELS["gemma3"].bundle(tmp_path)
    generator = Generator(load_model(out, device="cuda", dtype=torch.bfloat16), capacity=300)
    generator.prefill([5, 6, 7])
    generator.prepare(100)
    steps = generator._steps(3, TOGETHER)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert int(generator.cache.position) == 3 + 10 * TOGETHER
