"""The kernels of steps that read and write keys and values of 8 bits, emulated, against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from cuda_emulator.memory import emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.generate import attend_cuda
from q6k_kernels.generate.cache_codes import coded
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = cuda_emulator.requires_compiler
PLACES = 3
Make = Callable[[torch.dtype], Kernels]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype, PLACES)
    memory.check()


def filled(places: int, key_heads: int, slots: int, dim: int, window: int) -> Cached:
    """Return a cache of codes with random numbers in all slots."""
    both = [coded(3 * random(places, key_heads, slots, dim, seed=seed)) for seed in (5, 6)]
    (keys, of_keys), (values, of_values) = both
    return Cached(keys, values, window, scales=(of_keys, of_values))


def compare(
    run: Kernels, heads: Heads, caches: tuple[Cached, Cached], given: tuple[Tensor, ...], at: Tensor
) -> None:
    """Compare a step, and another that uses the keys and values which the first has written."""
    q, k, v = given
    for own in ((k, v), (None, None)):
        found, expected = (
            each.attend(q, *own, heads, cached, at, [nn.Identity()]).halves
            for each, cached in zip((run, TorchOperations()), caches, strict=True)
        )
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
    mine, theirs = caches
    for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
        assert (one.int() - other.int()).abs().max() <= 1
    for one, other in zip(mine.scales or (), theirs.scales or (), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("dtype", "dim", "group", "window", "softcap", "normed"),
    [
        (torch.bfloat16, 64, 3, 0, None, False),
        (torch.float16, 96, 2, 24, 2.0, True),
        (torch.bfloat16, 512, 2, 0, None, True),
    ],
)
def test_steps(
    make: Make,
    dtype: torch.dtype,
    dim: int,
    group: int,
    window: int,
    softcap: float | None,
    normed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first position, at the last, or where a ring has wrapped."""
    # One warp takes all turns; but of heads of 64 values one block has 16 warps, most of them without keys.
    given = {"FEW_SLOTS": {"int8": 0}, "MOST_BLOCKS": 1, "CODES_WARPS": 16 if dim == 64 else 1}
    for name, value in given.items():
        monkeypatch.setattr(attend_cuda, name, value)
    assert attend_cuda.block_of(dim, device_like(90), 40, True).warps == given["CODES_WARPS"]
    key_heads, slots = 2, 40
    norms = [Norm(1 + random(dim, seed=seed) / 4, 1e-5) for seed in (1, 2)]
    angles = 3 * random(64, dim // 2, seed=3)
    sizes = key_heads * group, key_heads, dim, dim**-0.5, softcap
    heads = Heads(*sizes, *norms, angles.cos(), angles.sin(), values_normed=normed)
    run = make(dtype)
    run.reserve(heads)
    vectors = tuple(random(1, n * dim, seed=n).to(dtype) for n in (heads.count, key_heads, key_heads))
    for position in (0, 39 if not window else 60):
        caches = filled(1, key_heads, slots, dim, window), filled(1, key_heads, slots, dim, window)
        compare(run, heads, caches, vectors, torch.tensor([position]))


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("codes", [False, True])
def test_a_text_grows_past_few_slots(make: Make, codes: bool, texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before and behind go on with the same cache, by blocks of more warps or with longer rings.

    Of several texts the longest decides.
    """
    few, dim, slots, dtype = 24, 128, 48, torch.bfloat16
    monkeypatch.setattr(attend_cuda, "FEW_SLOTS", {"model": few, "int8": few})
    blocks = [attend_cuda.block_of(dim, device_like(90), n, codes) for n in (few, few + 1)]
    assert [(each.warps, each.stages) for each in blocks] == ([(8, 1), (16, 1)] if codes else [(8, 1), (8, 2)])
    angles = 3 * random(64, dim // 2, seed=3)
    heads = Heads(4, 2, dim, dim**-0.5, None, None, None, angles.cos(), angles.sin())
    run = make(dtype)
    run.reserve(heads)
    pairs = [random(texts, 2, slots, dim, seed=seed).to(dtype) for seed in (5, 6)]
    mine, theirs = (
        filled(texts, 2, slots, dim, 0) if codes else Cached(*(each.clone() for each in pairs), 0) for _ in range(2)
    )
    places = torch.tensor([1, 0]) if texts == 2 else None
    for position in (few - 2, few - 1, few, few + 1, few - 1, slots - 1):  # back as well
        reach = few if position < few else slots
        given = tuple(random(texts, n * dim, seed=position + n).to(dtype) for n in (4, 2, 2))
        one, other = (replace(each, places=places, reach=reach) for each in (mine, theirs))
        compare(run, heads, (one, other), given, torch.tensor([position, 7][:texts]))


def test_steps_of_several_texts(make: Make) -> None:
    """Each with its place in the cache, in another order; heads of a part of the values that rotate."""
    dtype, dim, slots, texts = torch.float16, 64, 24, [2, 0]
    angles = 3 * random(64, dim // 4, seed=3)
    heads = Heads(*(4, 2, dim, dim**-0.5, None, None, None), angles.cos(), angles.sin())
    run = make(dtype)
    run.reserve(heads)
    q, k, v = (random(2, count * dim, seed=count).to(dtype) for count in (4, 2, 2))
    caches = [filled(PLACES, 2, slots, dim, 0) for _ in range(2)]
    mine, theirs = (replace(each, places=torch.tensor(texts)) for each in caches)
    compare(run, heads, (mine, theirs), (q, k, v), torch.tensor([9, 5, 23]))
    assert torch.equal(mine.keys[1], filled(PLACES, 2, slots, dim, 0).keys[1])
