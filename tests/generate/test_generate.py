"""Generating on the CPU: tokens and logits against transformers' own, with tiny random models of every family."""

from __future__ import annotations

import copy
import inspect
from itertools import pairwise
from typing import Any

import pytest

from families import ANSWER, FAMILIES, PROMPT, VOCABULARY, WINDOW, expected, prompt, tiny

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate import mailbox, recording
from q6k_kernels.generate.checking import CapacityError, NotFiniteError
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.kv_cache import cache_argument
from q6k_kernels.generate.sampling import LOWEST, choose, gumbel_noise
from q6k_kernels.models.cache_layout import SLACK

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_tokens_are_those_of_transformers(family: str) -> None:
    model, before = tiny(family), tiny(family).config._attn_implementation
    generator = Generator(model, capacity=PROMPT + ANSWER)
    logits = generator.prefill(prompt())
    torch.testing.assert_close(logits, model(torch.tensor([prompt()])).logits[0, -1], atol=3e-5, rtol=0)
    answer = list(generator.generate(ANSWER))
    assert answer == expected(family)
    assert (generator.length, generator.stop_reason) == (PROMPT + ANSWER, "length")
    # And of one pass over the whole text, without any cache: the ring has wrapped by then.
    whole = model(torch.tensor([prompt() + answer])).logits[0, PROMPT - 1 : -1]
    assert whole.argmax(dim=-1).tolist() == answer
    assert model.config._attn_implementation == before


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
def test_no_call_to_transformers_warns_of_its_end() -> None:
    generator = Generator(tiny("llama"), capacity=8, fused=False)
    generator.prefill(prompt(4))
    assert len(list(generator.generate(2))) == 2


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_passed_by_the_name_that_the_model_has(name: str) -> None:
    """One of the names is that of the installed release; the model of the other translates it."""
    model = tiny.__wrapped__("llama")  # one of its own
    inner, own = model.forward, cache_argument(model)

    def forward(**given: Any) -> Any:
        return inner(**{own if key == name else key: value for key, value in given.items()})

    signature = inspect.signature(inner)
    kinds = [each.replace(name=name) if each.name == own else each for each in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=kinds)  # type: ignore[attr-defined]
    model.forward = forward
    assert cache_argument(model) == name
    generator = Generator(model, capacity=PROMPT + 2, fused=False)
    generator.prefill(prompt())
    assert list(generator.generate(2)) == expected("llama")[:2]


@pytest.mark.parametrize(
    ("family", "chunk"),
    [
        ("llama", 1),
        ("mistral", WINDOW),
        ("mistral", 9),
        ("gemma2", 9),
        ("gemma3", 1),
        ("gemma3", WINDOW),
        ("qwen35", 1),
        ("qwen35", 33),
        ("gemma4", 33),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_prompt_in_chunks_is_the_prompt_at_once(family: str, chunk: int, fused: bool) -> None:
    ids = prompt(100)  # longer than a ring of window and slack
    generator = Generator(tiny(family), capacity=120, chunk=chunk, fused=fused)
    whole = tiny(family)(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(generator.prefill(ids), whole, atol=3e-5, rtol=0)
    at_once = Generator(tiny(family), capacity=120)
    at_once.prefill(ids)
    assert list(generator.generate(20)) == list(at_once.generate(20))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen35"])
@pytest.mark.parametrize("lag", [0, 8])
def test_steps_too_many_leave_no_trace(family: str, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox.Mailbox, "lag", lag)  # as on a GPU, where tokens are read late
    first, more = expected(family)[:60], prompt(7)
    generator = Generator(tiny(family), capacity=200)
    generator.prefill(prompt())
    tokens = generator.generate(120)
    assert [next(tokens) for _ in first] == first
    tokens.close()
    whole = tiny(family)(torch.tensor([prompt() + first + more])).logits[0, -1]
    torch.testing.assert_close(generator.prefill(more), whole, atol=3e-5, rtol=0)
    assert generator.length == PROMPT + 60 + 7


def test_a_stop_token_ends_the_answer_and_is_not_given() -> None:
    answer = expected("llama")
    stop = answer[12]
    end = answer.index(stop)
    generator = Generator(tiny("llama"), capacity=200)
    generator.prefill(prompt())
    assert list(generator.generate(ANSWER, stop={stop, VOCABULARY + 5})) == answer[:end]
    assert generator.stop_reason == "stop"
    assert generator.length == PROMPT + end + 1
    generator.reset()
    generator.prefill(prompt())
    assert list(generator.generate(ANSWER)) == answer


def test_a_cache_of_several_lengths_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SMALLEST_BUCKET", 16)
    generator = Generator(tiny("gemma3"), capacity=2 * (PROMPT + ANSWER))
    generator.prefill(prompt())
    assert list(generator.generate(ANSWER)) == expected("gemma3")
    assert sorted(generator._recorder.made) == [(64, 1), (168, 1)]
    generator.reset()
    generator.prefill(prompt(5))
    generator.prepare(20)
    assert (16, 1) in generator._recorder.made


@pytest.mark.parametrize("family", ["qwen2-sliding", "gemma2", "qwen35"])
def test_the_step_is_one_graph(family: str) -> None:
    torch.compiler.reset()
    generator = Generator(tiny(family), capacity=64)
    generator.prefill(prompt())
    tokens = [int(generator._token)]
    with generator._our_attention():
        step = torch.compile(generator.step, backend="eager", fullgraph=True, dynamic=False)
        for _ in range(30):
            step(64)
            tokens.append(int(generator._token))
    assert tokens == expected(family)[:31]


def test_a_seed_decides_and_nothing_else() -> None:
    def answer(seed: int, **more: Any) -> list[int]:
        generator = Generator(tiny("llama"), capacity=64, temperature=1.5, seed=seed, **more)
        generator.prefill(prompt())
        return list(generator.generate(30))

    assert answer(3) == answer(3) == answer(3, chunk=4)
    assert len({tuple(answer(seed)) for seed in range(4)}) == 4
    assert answer(0) != expected("llama")[:30]


def test_a_temperature_too_low_to_divide_by_takes_the_likeliest() -> None:
    for temperature in (1e-40, 5e-324, LOWEST / 2):
        generator = Generator(tiny("llama"), capacity=64, temperature=temperature)
        generator.prefill(prompt())
        assert list(generator.generate(12)) == expected("llama")[:12]
    logits = torch.tensor([[3e30, 1.0, -3e30, 3.1e30]])
    assert int(choose(logits, torch.tensor([3]), torch.tensor([7]), torch.tensor([LOWEST]))) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_suppressed_tokens_are_not_in_an_answer(fused: bool) -> None:
    """The likeliest are those of transformers' own `generate`; drawn tokens are others, too."""
    model = copy.deepcopy(tiny("llama"))
    model.generation_config.suppress_tokens = suppressed = sorted({*expected("llama")[:12]})
    answers = []
    for temperature in (0.0, 1.5):
        generator = Generator(model, capacity=80, temperature=temperature, fused=fused)
        generator.prefill(prompt())
        answers.append(list(generator.generate(40)))
        assert not {*answers[-1]} & {*suppressed}
    ids = torch.tensor([prompt()])
    found = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    assert answers[0] == found[0, ids.shape[1] :].tolist()


def test_choices_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0, 1.5]])
    seed, temperature = torch.tensor([7]), torch.tensor([0.8])
    draws = 4_000
    chosen = [int(choose(logits, torch.tensor([at]), seed, temperature)) for at in range(draws)]
    counts = torch.bincount(torch.tensor(chosen), minlength=6).double()
    share = torch.softmax(logits[0].double() / 0.8, dim=0) * draws
    assert counts[4] == 0
    likely = share > 5
    chi_square = float(((counts - share)[likely] ** 2 / share[likely]).sum())
    assert chi_square < 20.5  # of 4 degrees of freedom, passed by 0.04% of honest draws
    # Neighbours in position are independent: pairs of the two likeliest come as often as their product says.
    pairs = sum(a == 0 and b == 0 for a, b in pairwise(chosen)) / draws
    assert abs(pairs - float(share[0] / draws) ** 2) < 0.02


def test_noise_is_gumbels_in_every_way_of_counting() -> None:
    tokens, mean = torch.arange(200_000), 0.5772157
    for at, seed in ((0, 0), (1, 0), (0, 1), (5, (1 << 32) - 1)):
        noise = gumbel_noise(tokens, torch.tensor([at]), torch.tensor([seed])).double()
        assert noise.isfinite().all()
        assert abs(noise.mean() - mean) < 0.015
        assert abs(noise.std() - 1.2825) < 0.015
        assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 0.012
        assert noise.unique().numel() > 195_000
    a, b = (gumbel_noise(tokens, torch.tensor([at]), torch.tensor([0])) for at in (3, 4))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.012


def test_what_does_not_fit_is_named() -> None:
    generator = Generator(tiny("llama"), capacity=30)
    with pytest.raises(RuntimeError, match="no prompt to answer: call `prefill` first"):
        generator.generate(1)
    with pytest.raises(CapacityError, match="31 tokens, and the cache holds 30"):
        generator.prefill(prompt(31))
    generator.prefill(prompt())
    for tokens in (10, 1000):
        with pytest.raises(CapacityError, match=f"{PROMPT + tokens} tokens, and the cache holds 30"):
            generator.generate(tokens)
    assert len(list(generator.generate(9))) == 9
    for ids in ([], [-1], [VOCABULARY]):
        with pytest.raises(ValueError, match="ids: expected one or more of 0 to 96"):
            generator.prefill(ids)
    for wrong in ({"capacity": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"seed": 1 << 32}):
        with pytest.raises(ValueError, match="expected capacity and chunk"):
            Generator(tiny("llama"), **{"capacity": 30, **wrong})


def test_logits_that_are_no_numbers_are_an_error() -> None:
    import copy

    model = copy.deepcopy(tiny("llama"))
    model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match="infinite or not numbers in torch.float32"):
        Generator(model, capacity=30).prefill(prompt())


def test_layers_of_another_kind_are_refused() -> None:
    import copy

    model = copy.deepcopy(tiny("llama"))
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match="layers of kind chunked_attention"):
        Generator(model, capacity=30)


def test_nothing_grows_while_decoding() -> None:
    generator = Generator(tiny("gemma3"), capacity=400)
    generator.prefill(prompt())
    held, at = generator.cache.nbytes, [layer.keys.data_ptr() for layer in generator.cache._layers]
    assert held == 2 * 4 * 2 * 8 * (400 + 2 * (WINDOW + SLACK))
    assert len(list(generator.generate(150))) == 150
    assert generator.cache.nbytes == held
    assert [layer.keys.data_ptr() for layer in generator.cache._layers] == at
