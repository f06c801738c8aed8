"""Chunks of prompts as CUDA graphs: the same as launched one by one, and nothing that waits for the GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("libgguf")

from torch import Tensor

from dense_cases import DENSE
from model_cases import MODELS
from q6k_kernels import load_model
from q6k_kernels.generate.chunk_recording import SIZES
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.texts import Texts
from q6k_kernels.models.architecture import LINEAR
from tiny_qwen35 import QWEN35_MOE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="chunks are recorded on Hopper",
    ),
]
LENGTHS = (64, 64, 64, 40, 200, 150, 192, 192, 12, 9, 16, 16, 8, 300, 257)
"""Tokens of prompts, of which the first of each size is not recorded."""
CASES: dict[str, Any] = MODELS | DENSE
LARGE_HEADS = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_value_heads": 4,
    "head_dim": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CASES["qwen35moe, large heads"] = replace(QWEN35_MOE, config=QWEN35_MOE.config | LARGE_HEADS)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def both(model: Any, **given: Any) -> tuple[Generator, Generator]:
    """Return a generator that records chunks, and one that does not."""
    made = tuple(Generator(model, fused=True, **given) for _ in range(2))
    assert made[1]._fused_step is not None
    made[1]._fused_step._recorder = None
    return made


def sizes(generator: Generator) -> list[int]:
    assert generator._fused_step is not None
    assert generator._fused_step._recorder is not None
    return sorted(generator._fused_step._recorder.made)


def held(generator: Generator) -> list[Tensor]:
    cache = generator.cache
    attention = [layer for layer, kind in enumerate(cache.kinds) if kind != LINEAR]
    kept = [each for layer in attention for each in (*cache.buffers(layer), *(cache.scales(layer) or ()))]
    return [*kept, *cache.states.tensors]


def begin(*generators: Generator) -> None:
    """Begin a text in an empty cache."""
    for generator in generators:
        generator.reset()
        for part in held(generator) if generator.cache.nbytes else ():
            part.zero_()


def go_on(recorded: Generator, launched: Generator, prompt: list[int]) -> None:
    """Compare to the bit, if as many rows are computed; else parts of sums may be cut elsewhere."""
    exact = len(prompt) in SIZES
    found, expected = recorded.prefill(prompt), launched.prefill(prompt)
    close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 0.05, "atol": 0.05 * float(expected.std())}
    torch.testing.assert_close(found, expected, **close)
    if exact:
        assert all(map(torch.equal, held(recorded), held(launched)))


@pytest.mark.parametrize(
    ("name", "dtype", "cache_type"),
    [
        ("llama 3.1", torch.bfloat16, "model"),
        ("llama 3.1", torch.float16, "int8"),
        ("gemma3", torch.bfloat16, "model"),
        ("gemma2", torch.float16, "model"),
        ("gemma4, experts", torch.bfloat16, "model"),
        ("gemma4, shared keys", torch.bfloat16, "model"),
        ("qwen3moe", torch.bfloat16, "int8"),
        ("qwen35moe, large heads", torch.bfloat16, "model"),
        ("cohere2", torch.bfloat16, "model"),
    ],
)
def test_prompts_are_those_that_are_not_recorded(name: str, dtype: Any, cache_type: Any, tmp_path: Path) -> None:
    """Of texts of one prompt, and of texts that go on."""
    out, _ = CASES[name].bundle(tmp_path)
    recorded, launched = both(load_model(out, device="cuda", dtype=dtype), capacity=800, cache_type=cache_type)
    for seed, tokens in enumerate(LENGTHS):
        begin(recorded, launched)
        go_on(recorded, launched, text(tokens, seed))
    assert sizes(recorded) == [16, 64, 192, 320]
    begin(recorded, launched)
    for tokens in (64, 192, 16, 64, 192):  # past windows
        go_on(recorded, launched, text(tokens, tokens))
    assert list(recorded.generate(20)) == list(launched.generate(20))
    go_on(recorded, launched, text(37))


def test_texts_with_a_common_beginning_and_long_prompts(tmp_path: Path) -> None:
    out, _ = MODELS["llama 3.1"].bundle(tmp_path)
    model = load_model(out, device="cuda", dtype=torch.bfloat16)
    recorded, launched = both(model, capacity=400, chunk=128)
    common = text(100)
    for seed in range(6):
        prompt = [*common, 3 + seed, *text(63, seed)]
        found, expected = (each.resume(prompt) for each in (recorded, launched))
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.std()))
        assert recorded.reused == launched.reused == (100 if seed else 0)
    assert sizes(recorded) == [64]
    for seed in range(2):
        begin(recorded, launched)
        go_on(recorded, launched, text(350, seed))  # 128, 128 and 94 tokens
    assert sizes(recorded) == [64, 128]


def test_texts_at_once_share_what_is_recorded(tmp_path: Path) -> None:
    """Whatever their places; nothing of a prompt gets into another's."""
    out, _ = MODELS["gemma3"].bundle(tmp_path)
    model = load_model(out, device="cuda", dtype=torch.bfloat16)
    answers = []
    for records in (True, False):
        texts = Texts(model, capacity=200, places=4)
        if not records:
            texts._step._recorder = None
        here = [texts.join(text(64, seed), 12) for seed in range(4)]
        tokens: dict[Any, list[int | None]] = {each: [] for each in here}
        while pairs := texts.step():
            for each, token in pairs:
                tokens[each].append(token)
        answers.append([tokens[each] for each in here])
        assert not records or sorted(texts._step._recorder.made) == [64]  # type: ignore[union-attr]
    assert answers[0] == answers[1]


def test_a_recorded_chunk_neither_waits_nor_depends_on_freed_memory(tmp_path: Path) -> None:
    out, _ = MODELS["gemma3"].bundle(tmp_path)
    recorded, launched = both(load_model(out, device="cuda", dtype=torch.bfloat16), capacity=700)
    for tokens in (64, 64, 320, 320, 640, 640):  # larger ones need more scratch memory
        recorded.reset()
        recorded.prefill(text(tokens))
    torch.cuda.empty_cache()
    rubbish = [torch.full((1 << 22,), 0xEB, dtype=torch.uint8, device="cuda") for _ in range(64)]
    for tokens in (64, 320, 640, 64):
        begin(recorded, launched)
        go_on(recorded, launched, text(tokens))
    assert all(bool((each == 0xEB).all()) for each in rubbish)
    assert recorded._fused_step is not None
    recorded.reset()
    tokens_on_device = torch.tensor(text(64), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorded._fused_step.chunk(tokens_on_device, 0, last=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
