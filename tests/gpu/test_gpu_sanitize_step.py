"""What compute-sanitizer runs of a decoding step: see test_gpu_sanitize.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from q6k_kernels import PackedLinear
from q6k_kernels.generate import attend_cuda
from q6k_kernels.generate.cache_codes import coded
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed, Mixture, MixtureNorms
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TokenChoice, TorchOperations
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.generate.texts_cuda import TextKernels

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

DTYPE = torch.float16


def random(*shape: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(value: Any) -> Any:
    """The same on the GPU, by copies."""
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(map(moved, value))
    if isinstance(value, Norm | Heads | Cached | TokenChoice | TextsChoice | Mixed | MixtureNorms):
        return replace(value, **{name: moved(each) for name, each in vars(value).items()})
    return value


def users(k: int) -> list[nn.Module]:
    """One that wants 8 bits, one that wants 16."""
    return [PackedLinear(k, 16, device="cuda"), nn.Linear(1, 1)]


def kernels(texts: int = 1) -> Kernels:
    """Their memory set by copies, as that is what initcheck sees."""
    run = Kernels(torch.device("cuda", 0), DTYPE, texts)
    run._counted = moved(torch.zeros(texts, dtype=torch.int32))
    return run


def check(found: Any, expected: Any) -> None:
    torch.cuda.synchronize()
    torch.testing.assert_close(found.halves.cpu(), expected.halves, rtol=4e-3, atol=4e-3)
    assert found.codes.cpu().count_nonzero() > len(found.codes) // 2


@pytest.mark.parametrize("k", [512, 4352])
def test_sums_and_norms(k: int) -> None:
    hidden, delta = random(1, k), random(1, k, seed=1)
    after, norm = (Norm(random(k, dtype=torch.float32, seed=each), 1e-5) for each in (2, 3))
    run = kernels()
    total, found = run.add_norm(moved(hidden), moved(delta), moved(after), moved(norm), users(k))
    expected_total, expected = TorchOperations().add_norm(hidden, delta, after, norm, [])
    check(found, expected)
    torch.testing.assert_close(total.cpu(), expected_total, rtol=4e-3, atol=4e-3)


def test_sums_of_mixtures_and_further_norms() -> None:
    k, top = 512, 3
    rows, hidden, beside = (random(1, *shape, seed=len(shape)) for shape in ((top, k), (k,), (k,)))
    norms = [Norm(random(k, dtype=torch.float32, seed=each), 1e-5) for each in range(6)]
    mixed = Mixed(rows, random(1, top, seed=5).float(), beside, MixtureNorms(*norms[:4]))
    run = kernels()
    _, found = run.add_norm(moved(hidden), moved(mixed), moved(norms[4]), moved(norms[5]), users(k))
    check(found, TorchOperations().add_norm(hidden, mixed, norms[4], norms[5], [])[1])
    further: Any = norms[0], norms[1]
    _, found = run.add_norm(
        moved(hidden), moved(beside), None, moved(norms[5]), users(k), further=(moved(norms[0]), moved(norms[1]))
    )
    _, expected = TorchOperations().add_norm(hidden, beside, None, norms[5], [], further=further)
    check(found, expected)
    for one, other in zip(found.further, expected.further, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("count", [40, 300])
def test_routes(count: int) -> None:
    router, x = random(count + 1, 3200) / 50, random(1, 3200, seed=1)
    mixture = Mixture(router, nn.Identity(), count, 5, random(count, dtype=torch.float32).abs())
    there = replace(mixture, router=moved(router), scales=moved(mixture.scales))
    found, expected = kernels().route(moved(x), there), TorchOperations().route(x, mixture)
    assert torch.equal(found[0].cpu().long(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=4e-3, atol=4e-3)


def test_gates() -> None:
    gate, up = random(1, 768), random(1, 768, seed=1)
    run = kernels()
    check(run.gate(moved(gate), moved(up), "silu", users(768)), TorchOperations().gate(gate, up, "silu", []))


@pytest.mark.parametrize(
    ("dim", "window", "position", "blocks", "codes"),
    [
        *((64, 0, 150, 32, False), (64, 0, 150, 1, False), (128, 40, 250, 32, False), (256, 0, 8, 32, False)),
        *((512, 0, 60, 32, False), (128, 40, 250, 32, True), (64, 0, 150, 1, True)),
    ],
)
def test_attention(
    dim: int, window: int, position: int, blocks: int, codes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks, some without keys, or one, whose warps take turns; three query heads for each key head."""
    monkeypatch.setattr(attend_cuda, "MOST_BLOCKS", blocks)
    angles = [random(300, dim // 2, dtype=torch.float32, seed=each) for each in (0, 1)]
    norm = Norm(random(dim, dtype=torch.float32, seed=2), 1e-5)
    heads = Heads(12, 4, dim, dim**-0.5, 5.0 if window else None, norm, norm, *angles)
    q, k, v = (random(1, count * dim, seed=3 + count) for count in (12, 4, 4))
    held = [random(1, 4, 104 if window else 200, dim, seed=each) for each in (9, 10)]
    cached = Cached(held[0], held[1], window)
    if codes:
        (keys, of_keys), (values, of_values) = (coded(each) for each in held)
        cached = Cached(keys, values, window, scales=(of_keys, of_values))
    at = torch.tensor([position])
    run = kernels()
    run.reserve(heads)
    run._counters = moved(torch.zeros(len(run._counters), dtype=torch.int32))
    there = moved(cached)
    found = run.attend(moved(q), moved(k), moved(v), moved(heads), there, moved(at), users(12 * dim))
    check(found, TorchOperations().attend(q, k, v, heads, cached, at, []))
    torch.testing.assert_close(there.keys.cpu(), cached.keys, rtol=4e-3, atol=1 if codes else 4e-3)


def test_choices() -> None:
    logits = random(1, 5000)
    state = [torch.tensor([each]) for each in (3, 7)], torch.zeros(9, dtype=torch.int64), torch.tensor([1])
    suppressed = torch.arange(5000) % 3 == 0
    choice = TokenChoice(*state[0], state[1], state[2], 0.7, suppressed)
    there = moved(choice)
    kernels().choose(moved(logits), None, there)
    TorchOperations().choose(logits, None, choice)
    assert there.token.cpu() == choice.token
    assert there.position.cpu() == 4


@pytest.mark.parametrize("texts", [2, 3, 8])
def test_norms_and_gates_of_texts(texts: int) -> None:
    hidden, delta, gate, up = (random(texts, 768, seed=each) for each in range(4))
    after, norm = (Norm(random(768, dtype=torch.float32, seed=each), 1e-5) for each in (4, 5))
    run = TextKernels(torch.device("cuda", 0), DTYPE, kernels(texts))
    _, found = run.add_norm(moved(hidden), moved(delta), moved(after), moved(norm), users(768))
    check(found, TorchOperations().add_norm(hidden, delta, after, norm, [])[1])
    check(run.gate(moved(gate), moved(up), "silu", users(768)), TorchOperations().gate(gate, up, "silu", []))


@pytest.mark.parametrize(("texts", "window"), [(3, 0), (3, 40), (9, 0)])
def test_attention_and_choices_of_texts(texts: int, window: int) -> None:
    places, order = 12, torch.Generator().manual_seed(texts)
    rows, position = (
        torch.randperm(places, generator=order)[:texts],
        torch.randint(0, 190, (places,), generator=order),
    )
    angles = [random(300, 32, dtype=torch.float32, seed=each) for each in (0, 1)]
    heads = Heads(12, 4, 64, 0.125, None, None, None, *angles)
    q, k, v = random(texts, 20 * 64).split([12 * 64, 4 * 64, 4 * 64], dim=1)
    there = [each.contiguous() for each in moved(torch.cat([q, k, v], 1)).split([12 * 64, 4 * 64, 4 * 64], dim=1)]
    buffers = (random(places, 4, 104 if window else 200, 64, seed=each) for each in (9, 10))
    cached = Cached(*buffers, window, None, rows)
    run, there_cached = kernels(texts), moved(cached)
    run.reserve(heads)
    run._counters = moved(torch.zeros(len(run._counters), dtype=torch.int32))
    found = run.attend(*there, moved(heads), there_cached, moved(position), [nn.Identity()]).halves
    expected = TorchOperations().attend(q, k, v, heads, cached, position, []).halves
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)
    numbers = torch.arange(places)
    choice = TextsChoice(
        *(rows, (numbers > 2).long(), position, numbers.clone(), torch.zeros(places, 200, dtype=torch.int64)),
        seed=numbers,
        temperature=(numbers % 3).float() / 2,
        suppressed=random(places, 1504, seed=2) > 1,
    )
    there_choice, logits = moved(choice), random(texts, 1504, seed=7)
    run.choose_of_texts(moved(logits), None, there_choice)
    TorchOperations().choose_of_texts(logits, None, choice)
    assert torch.equal(there_choice.token.cpu(), choice.token)
    assert torch.equal(there_choice.chosen.cpu(), choice.chosen)
