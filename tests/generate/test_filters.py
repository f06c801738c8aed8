"""Which tokens are left to draw from, and how likely they are, against transformers' own processors of logits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from families import PROMPT, prompt, tiny

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.sampling import choose, gumbel_noise

SIZE = 1000
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": SIZE + 5},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.02},
    {"top_k": 60, "top_p": 0.8},
    {"top_k": 60, "top_p": 0.95, "min_p": 0.03},
    {"repeat_penalty": 1.4},
    {"repeat_penalty": 0.8, "top_p": 0.7},
    {"repeat_penalty": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]


def scores_of(seed: int, size: int = SIZE) -> Tensor:
    return 3 * torch.randn(1, size, generator=torch.Generator().manual_seed(seed))


def processed(logits: Tensor, text: list[int], temperature: float, settings: dict[str, Any]) -> Tensor:
    """By transformers' processors, in the order in which its `generate` applies them."""
    found: list[Any] = [TemperatureLogitsWarper(temperature)]
    if penalty := settings.get("repeat_penalty"):
        found.insert(0, RepetitionPenaltyLogitsProcessor(penalty))
    found += [TopKLogitsWarper(settings["top_k"])] if settings.get("top_k") else []
    found += [TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    found += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    result: Tensor = LogitsProcessorList(found)(torch.tensor([text]), logits.clone())
    return result


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_scores_are_those_of_transformers(settings: dict[str, Any], temperature: float) -> None:
    filters = Filters(**settings)
    for seed in range(5):
        logits, text = scores_of(seed), prompt(20)
        held = torch.tensor([*text, *[7] * 9])  # what lies behind the text does not count
        found = logits
        if filters.penalises:
            found = filters.penalised(found, held, torch.tensor([20]))
        found = found / temperature
        if filters.cuts:
            found = filters.kept(found)
        torch.testing.assert_close(found, processed(logits, text, temperature, settings), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_the_best_of_scores_and_noise(settings: dict[str, Any]) -> None:
    seed, temperature = torch.tensor([11]), torch.tensor([0.9])
    for at in range(20):
        logits, text, position = scores_of(at), prompt(20), torch.tensor([20 + at])
        held = torch.tensor([*text, *prompt(20)])
        token = choose(logits, position, seed, temperature, None, Filters(**settings), held)
        expected = processed(logits, held[: 20 + at].tolist(), 0.9, settings)
        assert int(token) == int((expected + gumbel_noise(torch.arange(SIZE), position, seed)).argmax())


def test_tokens_of_the_same_score_stay_or_go_together() -> None:
    """Logits of 16 bits are often alike; what is drawn must not depend on how a sort orders them."""
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    for filters in (Filters(top_k=2), Filters(top_k=4), Filters(top_p=0.55), Filters(top_p=0.7)):
        assert filters.kept(scores).isfinite().tolist() == [[True, False, True, True, True, False]]
    assert Filters(top_p=0.0).kept(scores).isfinite().sum() == 1
    assert Filters(top_p=0.4).kept(scores).isfinite().sum() == 1
    for filters in (Filters(top_k=1), Filters(top_p=0.5), Filters(min_p=0.5)):
        hidden = torch.tensor([[-math.inf, 1.0, -math.inf, 5.0]])
        assert filters.kept(hidden).argmax() == 3


def test_a_penalty_looks_back_as_far_as_it_is_told() -> None:
    logits, text = scores_of(1, 30), torch.tensor([3, 4, 5, 6, 7, 8])
    for last, penalised in (
        (None, [3, 4, 5, 6]),
        (2, [5, 6]),
        (1, [6]),
        (9, [3, 4, 5, 6]),
        (1 << 64, [3, 4, 5, 6]),
    ):
        found = Filters(repeat_penalty=2.0, repeat_last=last).penalised(logits, text, torch.tensor([4]))
        assert (found != logits)[0].nonzero()[:, 0].tolist() == penalised
    assert not Filters(repeat_penalty=2.0, repeat_last=0).penalises


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": 1e-44},
        {"repeat_penalty": 1e300},
        {"repeat_penalty": math.inf},
        {"repeat_last": -1},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected top_k and repeat_last of 0 or more"):
        Filters(**wrong)


def test_extreme_settings_leave_numbers() -> None:
    logits, text = torch.tensor([[1e30, -1e30, 1.0, 0.0]]), torch.arange(4)
    for penalty in (2.0**-20, 2.0**20):
        found = Filters(repeat_penalty=penalty).penalised(logits, text, torch.tensor([4]))
        expected = torch.where(logits < 0, logits.double() * penalty, logits.double() / penalty)
        assert torch.equal(found.double(), expected.float().double())
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [SETTINGS[7], SETTINGS[8], SETTINGS[10]], ids=str)
def test_a_generator_draws_as_transformers_would_with_the_same_noise(settings: dict[str, Any], fused: bool) -> None:
    """Every token, from logits of the whole text before it, without a cache."""
    model, count, temperature = tiny("llama"), 25, 1.3
    generator = Generator(
        model, capacity=60, temperature=temperature, seed=5, filters=Filters(**settings), fused=fused
    )
    generator.prefill(prompt())
    text = prompt()
    for token in generator.generate(count):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[:, -1]
        scores = processed(logits, text, temperature, settings)
        noise = gumbel_noise(torch.arange(logits.shape[-1]), torch.tensor([len(text)]), torch.tensor([5]))
        assert token == int((scores + noise).argmax())
        text.append(token)


def test_the_likeliest_token_is_penalised_too() -> None:
    penalty = {"repeat_penalty": 3.0}
    generator = Generator(tiny("llama"), capacity=60, filters=Filters(**penalty, top_k=3))
    generator.prefill(prompt())
    with torch.no_grad():
        answer = tiny("llama").generate(
            torch.tensor([prompt()]), max_new_tokens=20, do_sample=False, repetition_penalty=3.0
        )
    assert list(generator.generate(20)) == answer[0, PROMPT:].tolist()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("more", [{}, {"temperature": 1.2}, {"temperature": 1.2, "filters": Filters(top_k=5)}])
def test_likelihoods_are_those_of_the_models_own_logits(more: dict[str, Any], fused: bool) -> None:
    generator = Generator(tiny("llama"), capacity=60, logprobs=3, fused=fused, **more)
    generator.prefill(prompt())
    answer = list(generator.generate(15))
    with torch.no_grad():
        whole = tiny("llama")(torch.tensor([prompt() + answer])).logits[0, PROMPT - 1 : -1].log_softmax(-1)
    assert generator.likelihoods is not None
    found = generator.likelihoods.read(PROMPT, answer)
    assert [each.token for each in found] == answer
    for each, logs in zip(found, whole, strict=True):
        assert each.logprob == pytest.approx(float(logs[each.token]), abs=1e-4)
        best = logs.topk(3)
        assert [token for token, _ in each.likeliest] == best.indices.tolist()
        assert [log for _, log in each.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_likelihoods_of_the_chosen_tokens_alone() -> None:
    generator = Generator(tiny("llama"), capacity=60, logprobs=0)
    generator.prefill(prompt())
    answer = list(generator.generate(3))
    assert generator.likelihoods is not None
    assert all(each.likeliest == () and each.logprob < 0 for each in generator.likelihoods.read(PROMPT, answer))
    assert Generator(tiny("llama"), capacity=60).likelihoods is None
