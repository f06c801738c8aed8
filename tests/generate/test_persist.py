"""The persistent kernel of a step on the emulated GPU, against the same step in plain torch."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from cuda_emulator.memory import emulate
from q6k_kernels import load_model
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.cuda import device as launching
from q6k_kernels.errors import BlocksNotResidentError, UnsupportedModelError
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.persist_cuda import PersistentStep
from q6k_kernels.generate.planning import Planner
from q6k_kernels.generate.schedule import ROW_BYTES, SAME, ScheduleRow, pieces
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.jit.compiler import SOURCES

pytestmark = cuda_emulator.requires_compiler
CPU = torch.device("cpu", 0)


@pytest.mark.parametrize(
    ("name", "dtype", "order"),
    [("llama", torch.bfloat16, 0), ("qwen3", torch.float16, 1), ("gemma3", torch.bfloat16, 2)],
)
def test_steps_are_those_of_the_reference(
    name: str, dtype: torch.dtype, order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two weight types, windows, and norms of heads and of summands."""
    pytest.importorskip("libgguf")
    from model_cases import MODELS
    from tiny_models import Q8_0

    tiny = replace(MODELS[name], types=dict.fromkeys(("blk.*.attn_v*", "blk.1.ffn_down*"), Q8_0))
    out, _ = tiny.bundle(tmp_path)
    models = [load_model(out, dtype=dtype, weights="packed", activations=each) for each in ("int8", "bf16")]
    generator = Generator(models[0], capacity=80, fused=True)
    prompt = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    generator.prefill(prompt)
    exact, reference = (Step(each, generator.cache, TorchOperations()) for each in reversed(models))
    device = replace(device_like(90), multiprocessors=4)
    memory = emulate(monkeypatch, device)
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    whole = PersistentStep(CPU, dtype)
    step = Step(models[0], generator.cache, Kernels(CPU, dtype), whole=whole)
    for _ in range(2):
        right, expected = exact(generator._token), reference(generator._token)
        if whole.schedule is not None:
            cuda_emulator.load(*whole._variant).order = order
        found = step(generator._token)  # last, so that the cache has its keys
        noise = (expected - right).abs().max()
        assert (found - expected).abs().max() < 2 * noise + 0.02 * expected.std()
        generator._choose(expected)
    memory.check()


def test_steps_are_launches_where_blocks_have_no_room(tmp_path: Path) -> None:
    """As on a GPU that other programs share; the answer is the same, and a warning says why it comes later."""
    pytest.importorskip("libgguf")
    from model_cases import MODELS

    generator = Generator(load_model(MODELS["llama"].bundle(tmp_path)[0]), capacity=20, fused=True)
    generator.prefill([5, 6, 7])
    step = generator._fused_step
    assert step is not None
    expected, calls = step(generator._token), []

    def refused(*given: object) -> Any:
        calls.append(given)
        raise BlocksNotResidentError("the 132 blocks of q6k_persist wait for each other", "Give it all of the GPU.")

    step._whole = refused  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"q6k_persist wait for each other; .* launch\. Give it all"):
        found = step(generator._token)
    assert torch.equal(found, expected)
    assert torch.equal(step(generator._token), expected)
    assert len(calls) == 1


def planned(model: Any, *, dtype: torch.dtype = torch.bfloat16, arch: int = 90) -> Any:
    """What the plan of a model's step gives, without a GPU."""
    generator = Generator(model, capacity=40, fused=True)
    generator.prefill([5, 6, 7])
    planner = Planner(device_like(arch), CPU, dtype)
    step = generator._fused_step
    assert step is not None
    step._whole = lambda hidden, position, through: through(planner)  # type: ignore[assignment]
    step(generator._token)
    return planner.schedule()


def test_the_head_is_divided_where_its_sums_do_not_fit(tmp_path: Path) -> None:
    """As with 262,144 tokens on 132 blocks."""
    pytest.importorskip("libgguf")
    from model_cases import MODELS

    schedule = planned(load_model(MODELS["llama"].bundle(tmp_path)[0], dtype=torch.bfloat16, weights="packed"))
    head = replace(schedule.rows[-1], n=40_000, row_tiles=2500, total=2500, bias=1000, bias_kind=3)
    parts = pieces(head, 999, schedule.types[head.type], torch.bfloat16)
    assert [(part.n, part.row_tiles, part.total) for part in parts] == [(15984, 999, 999)] * 2 + [(8032, 502, 502)]
    assert [part.source for part in parts] == [head.source, SAME, SAME]
    tile = schedule.types[head.type].tile_bytes
    assert [part.tiles - head.tiles for part in parts] == [0, 999 * tile, 1998 * tile]
    assert [part.output - head.output for part in parts] == [0, 999 * 32, 1998 * 32]
    assert [part.bias for part in parts] == [1000, 1000 + 999 * 64, 1000 + 1998 * 64]


@pytest.mark.parametrize(
    ("name", "activations", "why"),
    [
        ("qwen3moe", "auto", "a PackedExperts"),
        ("qwen35", "auto", "gated delta nets"),
        ("llama", "bf16", "a PackedLinear with activations='bf16'"),
        ("olmo2", "auto", "norms of another form"),
    ],
)
def test_what_it_cannot_do_is_named(name: str, activations: Any, why: str, tmp_path: Path) -> None:
    pytest.importorskip("libgguf")
    from dense_cases import DENSE
    from model_cases import MODELS

    out, _ = (MODELS | DENSE)[name].bundle(tmp_path)
    model = load_model(out, dtype=torch.bfloat16, weights="packed", activations=activations)
    with pytest.raises(UnsupportedModelError, match=f"no persistent kernel for .*{why}"):
        planned(model)


def test_it_is_for_one_gpu_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libgguf")
    from model_cases import MODELS

    model = load_model(MODELS["llama"].bundle(tmp_path)[0], dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="a whole model on one GPU"):
        Generator(model, capacity=20, persistent=True)
    monkeypatch.setattr(launching, "device", lambda index: device_like(100))
    with pytest.raises(UnsupportedModelError, match=r"compute capability 10.0: expected 9.0"):
        PersistentStep(CPU, torch.bfloat16)


def test_the_struct_of_a_row_is_the_kernels() -> None:
    """Of the same length, which the compiler checks for the kernel's own."""
    text = (SOURCES / "schedule.cuh").read_text()
    struct = text[text.index("struct __align__(16) Row {") : text.index("static_assert(sizeof(Row)")]
    names = [name for line in struct.splitlines() for name in re.findall(r"\*?(\w+)[,;]", line)]
    assert names == [field.name for field in fields(ScheduleRow)]
    assert f"static_assert(sizeof(Row) == {ROW_BYTES}" in text
