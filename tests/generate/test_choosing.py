"""The kernel that chooses a token, emulated, against the same choice in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor

from cuda_emulator.memory import emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.generate import choose_cuda
from q6k_kernels.generate.choose_cuda import MOST_BLOCKS as CHOOSE_BLOCKS
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.likelihoods import Likelihoods
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TokenChoice, TorchOperations

pytestmark = cuda_emulator.requires_compiler

BLOCK = choose_cuda.THREADS * choose_cuda.VALUES
DTYPES = [torch.bfloat16, torch.float16]
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.dtype], Kernels]]:
    memory = emulate(monkeypatch, device_like(80))
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype)
    memory.check()


def chosen(
    run: Kernels | TorchOperations,
    logits: Tensor,
    temperature: float,
    softcap: float | None,
    at: int,
    suppressed: Tensor | None = None,
) -> int:
    """The token, which must have come to all places where it belongs, and nothing elsewhere."""
    position, token, seed = (torch.tensor([each]) for each in (at, -1, 3 * at))
    tokens = torch.full((64,), -1)
    run.choose(logits, softcap, TokenChoice(position, token, tokens, seed, temperature, suppressed))
    expected = torch.full((64,), -1)
    expected[at + 1] = token
    assert torch.equal(tokens, expected)
    assert int(position) == at + 1
    if isinstance(run, Kernels):
        assert not run._counted.any()
    return int(token)


def launches(run: Kernels) -> list[tuple[int, int, int]]:
    variant = choose_cuda.FILE, choose_cuda.CHOOSE, run._macros[:2]
    return cuda_emulator.load(*variant, 0).launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 5003, 32768])
@pytest.mark.parametrize(("temperature", "softcap"), [(0.0, None), (0.0, 3.0), (0.7, None), (1.3, 3.0)])
def test_choices_are_those_in_torch(
    make: Callable[[torch.dtype], Kernels],
    dtype: torch.dtype,
    vocabulary: int,
    temperature: float,
    softcap: float | None,
) -> None:
    """Where the best are alike, as many are in 16 bits, the first of them."""
    run = make(dtype)
    for at in range(3):
        numbers = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(at + vocabulary))
        logits = numbers.clamp(max=1.5).to(dtype)
        expected = chosen(TorchOperations(), logits, temperature, softcap, at)
        assert chosen(run, logits, temperature, softcap, at) == expected
    assert launches(run)[-1] == (-(-vocabulary // BLOCK), 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 9, 5003])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_suppressed_tokens_are_never_chosen(
    make: Callable[[torch.dtype], Kernels], dtype: torch.dtype, vocabulary: int, temperature: float
) -> None:
    """One after the other, each that was chosen before, until one is left or twenty have gone."""
    run, logits = make(dtype), torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
    suppressed, gone = torch.zeros(-(-vocabulary // 8) * 8, dtype=torch.bool), list[int]()
    while len(gone) < min(vocabulary - 1, 20):
        best = chosen(run, logits, temperature, 3.0, 7, suppressed)
        assert chosen(TorchOperations(), logits, temperature, 3.0, 7, suppressed) == best
        assert best not in gone
        suppressed[best] = True
        gone.append(best)
    if not temperature:
        values = logits[0].tolist()
        assert gone == sorted(range(vocabulary), key=lambda token: (-values[token], token))[: len(gone)]


def test_the_best_is_found_wherever_it_is(make: Callable[[torch.dtype], Kernels]) -> None:
    run, size = make(torch.bfloat16), 2 * BLOCK + 17
    edges = [at + by for at in (0, 8, 256, BLOCK, 2 * BLOCK, 2 * BLOCK + 8) for by in (-1, 0, 1, 7) if at + by >= 0]
    for best in [*edges, size - 2, size - 1]:
        logits = torch.full((1, size), -2.0).bfloat16()
        logits[0, best:] = -1.0  # and as good ones after it
        assert chosen(run, logits, 0.0, None, 5) == best


def test_more_tokens_than_threads(make: Callable[[torch.dtype], Kernels]) -> None:
    run, size = make(torch.float16), CHOOSE_BLOCKS * BLOCK + 5
    for best in (size - 1, 100):
        logits = torch.zeros(1, size).half()
        logits[0, best] = 1.0
        assert chosen(run, logits, 0.0, None, 0) == best
    assert launches(run)[-1] == (CHOOSE_BLOCKS, 1, 1)


@pytest.mark.parametrize(
    ("logits", "best"),
    [
        ([NAN] * 11, 10),
        ([NAN, -3.0, NAN, -2.0, NAN], 3),
        ([-INFINITY, NAN, -INFINITY], 0),
        ([-1.0, -0.0, 0.0, -0.0], 1),
        ([1.0, INFINITY, INFINITY, NAN], 1),
        ([-2.0, -1.0, -1.0, -3.0], 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_all_kinds(
    make: Callable[[torch.dtype], Kernels], dtype: torch.dtype, logits: list[float], best: int
) -> None:
    """Those that are none do not count; where there are no others, the last token is as good as any."""
    assert chosen(make(dtype), torch.tensor([logits], dtype=dtype), 0.0, None, 7) == best


def test_threads_may_run_in_any_order(make: Callable[[torch.dtype], Kernels]) -> None:
    run = make(torch.bfloat16)
    logits = torch.randn(1, 3 * BLOCK + 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    kernel = cuda_emulator.load(choose_cuda.FILE, choose_cuda.CHOOSE, run._macros[:2], 0)
    try:
        for kernel.order in (0, 1, 2, 3):
            for temperature in (0.0, 1.0):
                expected = chosen(TorchOperations(), logits, temperature, None, 9)
                assert chosen(run, logits, temperature, None, 9) == expected
    finally:
        kernel.order = 0


@pytest.mark.parametrize("filters", [None, Filters(top_k=9), Filters(top_p=0.6), Filters(9, 0.9, 0.2, 1.5)])
@pytest.mark.parametrize(("softcap", "hidden"), [(None, False), (3.0, True)])
@pytest.mark.parametrize("size", [7, 300, 1032])
def test_filters_and_likelihoods_are_those_in_torch(
    make: Callable[[torch.dtype], Kernels], filters: Filters | None, softcap: float | None, hidden: bool, size: int
) -> None:
    """What filters cut the kernel does not draw; likelihoods are noted behind it. Penalties are in torch."""
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(2)).bfloat16()
    suppressed = None
    if hidden:
        suppressed = torch.zeros(-(-size // 8) * 8, dtype=torch.bool)
        suppressed[logits[0].topk(3).indices] = True
    results = []
    for run in (make(torch.bfloat16), TorchOperations()):
        noted, tokens = Likelihoods(8, 2, torch.device("cpu")), torch.tensor([3, 9, 7, 0, 0, 0, 0, 0])
        state = torch.tensor([2]), torch.tensor([7]), tokens, torch.tensor([1])
        for seed in range(12):
            state[0].fill_(2)
            state[3].fill_(seed)
            run.choose(logits, softcap, TokenChoice(*state, 0.9, suppressed, filters, noted))
            assert int(state[0]) == 3
            results.append(noted.read(3, [int(state[1])]))
    assert results[:12] == results[12:]
    assert all(each[0].logprob < 0 for each in results)
    if suppressed is not None:
        assert not any(suppressed[each[0].token] for each in results)
