"""The persistent kernel of a step on a GPU, against the same step as a launch for each operation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from q6k_kernels import load_model
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.persist_cuda import ARCH, PersistentStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != divmod(ARCH, 10),
        reason="needs compute capability 9.0",
    ),
]
WIDE = {"hidden_size": 1024, "intermediate_size": 2304, "num_hidden_layers": 3}
CASES = {"llama": {}, "qwen3": {}, "gemma2": {}, "gemma3": {}, "wide": WIDE}


def bundle(name: str, folder: Path) -> Path:
    """A bundle of two weight types; the wide one has a part for each multiprocessor."""
    pytest.importorskip("libgguf")
    from model_cases import MODELS
    from tiny_models import Q8_0

    tiny = MODELS["llama" if name == "wide" else name]
    types = {"blk.*.attn_v*": Q8_0, "blk.1.ffn_down*": Q8_0}
    return replace(tiny, config=tiny.config | CASES[name], types=types).bundle(folder)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As far from those of launches as a rounding can be a step of 8 bits; graphs repeat what single steps give."""
    model = load_model(bundle(name, tmp_path), device="cuda", dtype=dtype)
    prompt = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    persistent, launched = (Generator(model, capacity=600, persistent=each) for each in (True, False))
    for generator in (persistent, launched):
        generator.prefill(prompt)
    tokens = [int(persistent._token)]
    for _ in range(100):
        found, expected = (_step(each) for each in (persistent, launched))
        assert float((found - expected).abs().max()) < 0.12 * float(expected.std())
        for generator in (persistent, launched):
            generator._choose(found)  # in torch
        tokens.append(int(persistent._token))
    persistent.reset()
    persistent.prefill(prompt)
    assert list(persistent.generate(500))[: len(tokens)] == tokens


def _step(generator: Generator) -> Any:
    assert generator._fused_step is not None
    return generator._fused_step(generator._token)


def test_a_trace_has_a_time_for_each_row_and_block(tmp_path: Path) -> None:
    generator = Generator(load_model(bundle("llama", tmp_path), device="cuda"), capacity=60, persistent=True)
    generator.prefill([5, 6, 7])
    _step(generator)
    whole: PersistentStep = generator._fused_step._whole  # type: ignore[union-attr,assignment]
    assert whole.schedule is not None
    whole.trace = torch.zeros(len(whole.schedule.rows), whole.schedule.grid, 6, dtype=torch.int64, device="cuda")
    _step(generator)
    begins = whole.trace[:, :, 0]
    assert (begins > 0).all()
    assert (begins.diff(dim=0) >= 0).all()
