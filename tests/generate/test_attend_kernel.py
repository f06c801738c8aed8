"""The kernel of attention, emulated, against the same in plain torch: head sizes, norms, values that are keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from cuda_emulator.memory import emulate
from q6k_kernels import PackedLinear
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.generate import attend_cuda
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = cuda_emulator.requires_compiler


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.dtype], Kernels]]:
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype)
    memory.check()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(
    ("dim", "group", "window", "values"),
    [
        (64, 3, 0, "projected"),
        (64, 2, 24, "normed"),
        (512, 8, 0, "keys"),
        (512, 2, 24, "of another layer"),
    ],
)
def test_attention(make: Callable[[torch.dtype], Kernels], dim: int, group: int, window: int, values: str) -> None:
    """At a position in the first block, and where a ring has wrapped or a second block has keys."""
    dtype, key_heads, slots = torch.bfloat16, 2, 40
    norms = [Norm(1 + random(dim, seed=seed) / 4, 1e-5) for seed in (1, 2)]
    angles = 3 * random(64, dim // 2, seed=3)
    normed: Any = [None, None] if values == "projected" else norms
    heads = Heads(
        *(key_heads * group, key_heads, dim, dim**-0.5, None, *normed, angles.cos(), angles.sin()),
        values_normed=values != "projected",
    )
    run, users = make(dtype), [nn.Identity()]
    run.reserve(heads)
    q, k, v = (
        random(1, count * dim, seed=each).to(dtype)
        for each, count in enumerate((heads.count, key_heads, key_heads))
    )
    own = (k, k if values == "keys" else v)
    for position in (5, 39 if not window else 60):
        cache = [random(1, key_heads, slots, dim, seed=each).to(dtype) for each in (5, 6)]
        mine, theirs = (Cached(*(each.clone() for each in cache), window) for _ in range(2))
        at = torch.tensor([position])
        if values == "of another layer":  # whose launch comes first
            run.attend(q, *own, heads, mine, at, users)
        given = (None, None) if values == "of another layer" else own
        found = run.attend(q, *given, heads, mine, at, users).halves
        expected = TorchOperations().attend(q, *own, heads, theirs, at, []).halves
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-2, atol=1e-2)
    assert not run._counters.any()


def test_rings_of_several_pieces(make: Callable[[torch.dtype], Kernels], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one warp, or of three blocks of two warps, whose last turns are those of others."""
    dtype, slots, dim, stages = torch.float16, 168, 64, 3
    angles = 3 * random(slots, dim // 2, seed=3)
    heads = Heads(*(4, 2, dim, dim**-0.5, None, None, None), angles.cos(), angles.sin())
    q, k, v = (random(1, count * dim, seed=count).to(dtype) for count in (4, 2, 2))
    for blocks, warps in ((1, 1), (3, 2)):
        given = {"FEW_SLOTS": {"model": 100}, "MOST_BLOCKS": blocks, "ATTEND_WARPS": (warps,)}
        for name, value in {**given, "LONG_STAGES": {dim: stages}}.items():
            monkeypatch.setattr(attend_cuda, name, value)
        run = make(dtype)
        run.reserve(heads)
        assert attend_cuda.block_of(dim, run._device, slots, False).stages == stages
        for position in (3, 100, 167):
            cache = [random(1, 2, slots, dim, seed=each).to(dtype) for each in (5, 6)]
            mine, theirs = (Cached(*(each.clone() for each in cache), 0) for _ in range(2))
            at = torch.tensor([position])
            found = run.attend(q, k, v, heads, mine, at, [nn.Identity()]).halves
            expected = TorchOperations().attend(q, k, v, heads, theirs, at, []).halves
            assert found is not None
            assert expected is not None
            torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(mine.values.double(), theirs.values.double())


@pytest.mark.parametrize("part", ["head", "projection", "rotated head"])
@pytest.mark.parametrize(
    ("neighbours", "rotated", "sinks"), [(True, 64, False), (True, 32, True), (False, 32, True)]
)
def test_heads_of_other_forms(
    make: Callable[[torch.dtype], Kernels], part: Any, neighbours: bool, rotated: int, sinks: bool
) -> None:
    """Norms of whole projections and of rotated heads, neighbours that rotate, parts of heads, and sinks."""
    dtype, dim, key_heads, group, slots = torch.bfloat16, 64, 2, 3, 24
    widths = (key_heads * group, key_heads) if part == "projection" else (1, 1)
    norms = [Norm(1 + random(width * dim, seed=seed) / 4, 1e-5) for seed, width in enumerate(widths)]
    angles = 3 * random(64, rotated // 2, seed=3)
    heads = Heads(
        *(key_heads * group, key_heads, dim, dim**-0.5, None, *norms, angles.cos(), angles.sin()),
        normed=part,
        neighbours=neighbours,
        sinks=2 * random(key_heads * group, seed=4) if sinks else None,
    )
    run = make(dtype)
    run.reserve(heads)
    q, k, v = (
        (3 * random(1, count * dim, seed=each)).to(dtype)
        for each, count in enumerate((heads.count, key_heads, key_heads))
    )
    cache = [random(1, key_heads, slots, dim, seed=each).to(dtype) for each in (5, 6)]
    mine, theirs = (Cached(*(each.clone() for each in cache), 0) for _ in range(2))
    at = torch.tensor([20])
    found = run.attend(
        q, k, v, heads, mine, at, [PackedLinear(heads.count * dim, 16, format="q8_0"), nn.Identity()]
    )
    expected = TorchOperations().attend(q, k, v, heads, theirs, at, []).halves
    assert found.halves is not None
    assert found.codes is not None
    assert expected is not None
    torch.testing.assert_close(found.halves.double(), expected.double(), rtol=2e-2, atol=2e-2)
    # With zeros behind the 384 values, up to the end of a super-block.
    assert torch.equal(found.codes, decode._quantize(found.halves, 1, run._device))
    torch.testing.assert_close(mine.keys.double(), theirs.keys.double(), rtol=1e-2, atol=1e-2)
