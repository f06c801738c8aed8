"""The kernels for a token of each of several texts, emulated, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

import cuda_emulator
import packed

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from cuda_emulator.memory import emulate
from q6k_kernels import PackedLinear
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode, decode_plan
from q6k_kernels.generate import attend_cuda, choose_cuda
from q6k_kernels.generate.filters import Filters, FiltersOfTexts
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.generate.texts_cuda import TextKernels

pytestmark = cuda_emulator.requires_compiler

CPU, PLACES = torch.device("cpu"), 5


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    # So few multiprocessors that some numbers of texts have one block for all keys of a head, and some several.
    memory = emulate(monkeypatch, replace(device_like(90), multiprocessors=12))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield Kernels(torch.device("cpu", 0), torch.bfloat16, PLACES)
    memory.check()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(
    ("places", "window", "gated"),
    [([3], 0, True), ([2, 0], 0, False), ([4, 1, 0, 2], 0, True), ([1, 3, 4], 24, False)],
)
def test_attention(run: Kernels, places: list[int], window: int, gated: bool) -> None:
    """Texts of different lengths, in no order; a ring has wrapped in some. Other places stay as they were."""
    dim, key_heads, group, slots, dtype = 64, 2, 3, 40, torch.bfloat16
    norms = [Norm(1 + random(dim, seed=seed) / 4, 1e-5) for seed in (1, 2)]
    angles = 3 * random(64, dim // 2, seed=3)
    heads = Heads(
        *(key_heads * group, key_heads, dim, dim**-0.5, None, *norms, angles.cos(), angles.sin()),
        growth=1 + random(64, seed=4).abs(),
        gated=gated,
    )
    run.reserve(heads)
    position = torch.tensor([39, 5, 0, 17, 60] if window else [39, 5, 0, 17, 33])
    # Rows apart, as those of a product of all three.
    widths = [heads.count * dim * (1 + gated), key_heads * dim, key_heads * dim]
    q, k, v = random(len(places), sum(widths)).to(dtype).split(widths, dim=1)
    cache = [random(PLACES, key_heads, slots, dim, seed=each).to(dtype) for each in (5, 6)]
    rows = torch.tensor(places)
    mine, theirs = (Cached(*(each.clone() for each in cache), window, None, rows) for _ in range(2))
    found = run.attend(q, k, v, heads, mine, position, [nn.Identity()]).halves
    expected = TorchOperations().attend(q, k, v, heads, theirs, position, []).halves
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
    for one, other, before in ((mine.keys, theirs.keys, cache[0]), (mine.values, theirs.values, cache[1])):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-2, atol=1e-2)
        changed = (one != before).any(-1).any(1).nonzero().tolist()
        assert changed == sorted([place, int(position[place]) % slots] for place in places)
    assert not run._counters.any()


@pytest.mark.parametrize(("texts", "k", "users"), [(3, 96, "both"), (8, 288, "codes")])
def test_norms_and_gates_quantise_for_the_products(run: Kernels, texts: int, k: int, users: str) -> None:
    """Rows that there is room for, but no text, are zeros, as `q6k_quantize` leaves them."""
    operations = TextKernels(torch.device("cpu", 0), torch.bfloat16, run)
    seeing: list[nn.Module] = [PackedLinear(k, 16, format="q8_0"), nn.Identity()][: 1 + (users == "both")]
    hidden, delta = (random(texts, k, seed=seed).bfloat16() for seed in (1, 2))
    after, norm = (Norm(1 + random(k, seed=seed) / 4, 1e-5) for seed in (3, 4))
    gate, up = random(texts, 2 * k, seed=5).bfloat16().chunk(2, dim=1)
    halves = replace(operations.add_norm(hidden, delta, after, norm, [nn.Identity()])[1], codes=None)
    total, found = operations.add_norm(hidden, delta, after, norm, seeing)
    expected, normed = TorchOperations().add_norm(hidden, delta, after, norm, [])
    assert normed.halves is not None
    torch.testing.assert_close(total.double(), expected.double(), rtol=2**-7, atol=2**-7)
    tokens = decode_plan.tokens_of(texts)
    for given, reference in (
        (found, halves.halves),
        (operations.gate(gate, up, "silu", seeing), operations.gate(gate, up, "silu", [nn.Identity()]).halves),
    ):
        assert reference is not None
        assert (given.rows, given.k) == (texts, k)
        assert given.codes is not None
        assert torch.equal(given.codes, decode._quantize(reference, tokens, run._device))
        assert (given.halves is None) == (users == "codes")
        if given.halves is not None:
            assert torch.equal(given.halves, reference)
    torch.testing.assert_close(halves.halves.double(), normed.halves.double(), rtol=2**-6, atol=2**-7)


@pytest.fixture
def layer() -> PackedLinear:
    """Made before memory is emulated."""
    return PackedLinear.from_weight(packed.weight((40, 512)), activations="int8")


def test_products_take_what_is_quantised(layer: PackedLinear, run: Kernels) -> None:
    """A unit in the last place apart from the reference, whose sums are exact."""
    operations = TextKernels(torch.device("cpu", 0), torch.bfloat16, run)
    norm, users = Norm(random(512, seed=1), 1e-5), [layer, nn.Identity()]
    x = operations.add_norm(random(3, 512).bfloat16(), None, None, norm, users)[1]
    assert x.halves is not None
    assert x.codes is not None
    found = operations.multiply(layer, x)
    torch.testing.assert_close(found.double(), layer(x.halves).double(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("texts", range(1, 33))
def test_there_is_memory_for_the_parts_of_all_blocks(texts: int) -> None:
    """And the blocks of all texts together are as many as wanted, or one for each head."""
    device = device_like(90)
    angles = torch.zeros(8, 64)
    for key_heads, group in ((8, 4), (1, 8), (32, 1), (4, 7)):
        heads = Heads(key_heads * group, key_heads, 128, 1.0, None, None, None, angles, angles)
        rows, blocks, together = attend_cuda.grid(heads, device, texts)
        assert rows * together == heads.count
        assert blocks == 1 or rows * blocks * texts <= attend_cuda.BLOCKS_OF_TEXTS * device.multiprocessors
        assert blocks <= attend_cuda.MOST_BLOCKS


def choice(places: list[int], *, temperature: bool, suppressed: Tensor | None) -> TextsChoice:
    tokens = torch.randint(0, 300, (PLACES, 12), generator=torch.Generator().manual_seed(1))
    return TextsChoice(
        places=torch.tensor(places),
        advances=torch.tensor([1, 1, 0, 1, 1]),
        position=torch.tensor([4, 9, 0, 10, 0]),
        token=torch.full((PLACES,), -1),
        chosen=tokens,
        seed=torch.tensor([7, 2**32 - 1, 0, 7, 5]),
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.3, 0.0]) if temperature else None,
        suppressed=suppressed,
    )


@pytest.mark.parametrize("size", [8, 304, 5000])
@pytest.mark.parametrize(("temperature", "softcap", "hidden"), [(False, None, True), (True, 3.0, False)])
def test_choices_are_those_in_torch(
    run: Kernels, size: int, temperature: bool, softcap: float | None, hidden: bool
) -> None:
    suppressed = random(PLACES, size, seed=3) > 1 if hidden else None
    for places in ([3], [4, 1], [0, 2, 1, 3]):
        logits = random(len(places), size, seed=len(places)).clamp(max=1.5).bfloat16()
        both = [choice(places, temperature=temperature, suppressed=suppressed) for _ in range(2)]
        before = choice(places, temperature=False, suppressed=None)
        for operations, each in zip((run, TorchOperations()), both, strict=True):
            operations.choose_of_texts(logits, softcap, each)
        for name in ("position", "token", "chosen"):
            mine, theirs = (getattr(each, name) for each in both)
            assert torch.equal(mine, theirs), name
        moved = (both[0].position != before.position).nonzero()[:, 0].tolist()
        assert moved == [place for place in sorted(places) if place != 2]
        assert not run._counted.any()
    variant = choose_cuda.FILE, choose_cuda.CHOOSE_OF_TEXTS, run._macros[:2]
    assert cuda_emulator.load(*variant, 0).launches[-1] == (-(-size // 1024), 4, 1)


@pytest.mark.parametrize("size", [9, 304])
def test_filters_and_sizes_that_the_kernel_does_not_take(run: Kernels, size: int) -> None:
    """Rows of 9 logits are not aligned."""
    filters = FiltersOfTexts.none(PLACES, CPU)
    filters.put(1, Filters(3, 0.9, 0.1, 1.5, 4))
    logits, found = random(4, size).bfloat16(), list[TextsChoice]()
    for operations in (run, TorchOperations()):
        each = choice([0, 2, 1, 3], temperature=True, suppressed=None)
        operations.choose_of_texts(logits, None, each if size == 9 else replace(each, filters=filters))
        found.append(each)
    assert torch.equal(found[0].chosen, found[1].chosen)
    assert torch.equal(found[0].token, found[1].token)
