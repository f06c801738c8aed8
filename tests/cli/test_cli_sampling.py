"""Options of `generate` that decide which tokens are drawn, what ends an answer, and what is told of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from bundle_helpers import failed, invoke
from q6k_convert.run.memory import planned
from q6k_convert.run.stop_texts import StopTexts
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.generator import Generator
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from tiny_bundle import TinyBundle, ids_of, tiny_bundle

PROMPT = "The dog"
_COUNTS = ("top_k", "penalty_last_n")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    return tiny_bundle(tmp_path, monkeypatch)


def generated(tiny: TinyBundle, *options: str, count: int = 20) -> dict[str, Any]:
    given = ("generate", tiny.path, "-p", PROMPT, "--max-new-tokens", str(count), "--device", "cpu", "--json")
    done = invoke(*given, *options)
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"stderr": done.stderr}


def drawn(tiny: TinyBundle, count: int = 20, **settings: Any) -> list[int]:
    """By a generator of the same settings, whose own tests compare it with transformers."""
    more = {name: settings.pop(name) for name in ("temperature", "seed") if name in settings}
    generator = Generator(tiny.model.float(), capacity=60, filters=Filters(**settings), **more)
    generator.prefill(ids_of(PROMPT))
    return list(generator.generate(count, stop=load_tokenizer(tiny.path).stop_ids))


def test_each_option_reaches_the_draws(tiny: TinyBundle) -> None:
    options = {"top_k": 100, "top_p": 0.95, "min_p": 0.1, "repeat_penalty": 1.6, "repeat_last": 2}
    given = ["--temperature", "1.4", "--seed", "1"]
    results = [drawn(tiny, temperature=1.4, seed=1)]
    assert generated(tiny, *given)["token_ids"] == results[0]
    for name, value in options.items():
        given += [f"--{name.replace('_', '-')}", str(value)]
        settings = {key: options[key] for key in list(options)[: list(options).index(name) + 1]}
        results.append(drawn(tiny, temperature=1.4, seed=1, **settings))
        document = generated(tiny, *given)
        assert document["token_ids"] == results[-1]
    assert {name: document[name] for name in options} == options
    assert len({tuple(each) for each in results}) >= 4  # the options change something


def test_the_file_states_defaults_and_options_override_them(tiny: TinyBundle) -> None:
    stated = {"temp": 1.3, "top_k": 12, "top_p": 0.75, "min_p": 0.25, "penalty_repeat": 1.5, "penalty_last_n": 9}
    tiny.write(**{f"general__sampling__{name}": value for name, value in stated.items()})
    document = generated(tiny)
    settings = {"top_k": 12, "top_p": 0.75, "min_p": 0.25, "repeat_penalty": 1.5, "repeat_last": 9}
    assert {name: document[name] for name in settings} == settings
    assert document["temperature"] == pytest.approx(1.3)
    assert document["token_ids"] == drawn(tiny, temperature=document["temperature"], **settings)
    words = "temperature 1.3, top-k 12, top-p 0.75, min-p 0.25, repeat-penalty 1.5, repeat-last 9"
    assert f"sampling as the file states: {words}; options override it" in document["stderr"].replace("\n", " ")
    greedy = generated(tiny, "--temperature", "0", "--repeat-penalty", "1", "--top-k", "0")
    assert greedy["token_ids"] == tiny.best(ids_of(PROMPT), 20)
    assert (greedy["temperature"], greedy["top_k"], greedy["top_p"]) == (0, 0, 0.75)


def test_what_a_file_states_wrongly_or_beyond_what_is_built(tiny: TinyBundle) -> None:
    for name, value, words in (
        ("temp", -1.0, "general.sampling.temp: expected 0 to 100, found -1"),
        ("temp", 3e38, "general.sampling.temp: expected 0 to 100, found 3e+38"),
        ("top_p", 1.5, "general.sampling.top_p: expected 0 to 1, found 1.5"),
        ("penalty_repeat", float("nan"), "general.sampling.penalty_repeat: expected 0.01 to 100, found nan"),
        ("penalty_repeat", 1e-3, "general.sampling.penalty_repeat: expected 0.01 to 100, found 0.001"),
        ("top_k", "many", "general.sampling.top_k: expected a whole number, found STRING"),
    ):
        tiny.write(**{f"general__sampling__{name}": value})
        failed(invoke("generate", tiny.path, "-p", "x", "--device", "cpu"), 3, words, "Make the bundle again")
    tiny.write(general__sampling__mirostat=2, general__sampling__xtc_probability=0.0)
    document = generated(tiny, count=2)
    assert "the file asks for general.sampling.mirostat, which is not built" in document["stderr"]
    most = (1 << 32) - 1
    tiny.write(general__sampling__penalty_repeat=1.5, **{f"general__sampling__{name}": most for name in _COUNTS})
    document = generated(tiny)
    assert (document["top_k"], document["repeat_last"]) == (1 << 24, 1 << 24)
    assert document["token_ids"] == drawn(tiny, repeat_penalty=1.5)


def test_a_stop_text_ends_the_answer_wherever_tokens_part(tiny: TinyBundle) -> None:
    whole = generated(tiny)["text"]
    tokenizer = load_tokenizer(tiny.path)
    pieces = [tokenizer.decode([token]) for token in generated(tiny)["token_ids"]]
    at = len("".join(pieces[:6])) - 1  # the end of one token and the beginning of the next
    stop = whole[at : at + 2]
    document = generated(tiny, "--stop", "never there", "--stop", stop)
    assert document["text"] == whole[: whole.index(stop)]
    assert (document["stop_reason"], document["stop_text"]) == ("stop", stop)
    assert len(document["token_ids"]) < 20
    assert generated(tiny, "--stop", "never there")["text"] == whole
    done = invoke("generate", tiny.path, "-p", PROMPT, "--stop", stop, "--device", "cpu", "--max-new-tokens", "20")
    assert done.stdout == document["text"] + "\n"
    failed(invoke("generate", tiny.path, "-p", "x", "--stop", "", "--device", "cpu"), 2, "a stop text is empty", "")


def test_log_probabilities_are_those_of_the_models_logits(tiny: TinyBundle) -> None:
    document = generated(
        tiny, "--logprobs", "2", "--temperature", "1.5", "--top-k", "40", "--repeat-penalty", "1.3"
    )
    ids, prompt = document["token_ids"], ids_of(PROMPT)
    with torch.no_grad():
        logs = tiny.model.float()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    tokenizer = load_tokenizer(tiny.path)
    for row, of_token, token in zip(document["logprobs"], logs, ids, strict=True):
        best = of_token.topk(2)
        assert (row["token_id"], row["text"]) == (token, tokenizer.decode([token]))
        assert row["logprob"] == pytest.approx(float(of_token[token]), abs=1e-4)
        assert [each["token_id"] for each in row["likeliest"]] == best.indices.tolist()
        assert [each["logprob"] for each in row["likeliest"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    first = document["logprobs"][0]
    assert f"{first['logprob']:.4f} {first['text']!r}" in document["stderr"]
    assert "logprobs" not in generated(tiny, count=2)


def test_a_context_sizes_the_cache_and_is_planned(tiny: TinyBundle) -> None:
    def fails(*options: str, cause: str, remedy: str) -> None:
        failed(invoke("generate", tiny.path, "-p", PROMPT, "--device", "cpu", *options), 2, cause, remedy)

    document = generated(tiny, "--context", "64")
    assert "memory: a cache whose size is not known" in document["stderr"]  # the tiny file is no whole model
    cause = "4 tokens of prompt and 20 new ones are 24, and --context is 20 positions"
    fails("--context", "20", "--max-new-tokens", "20", cause=cause, remedy="--max-new-tokens 16")
    fails("--context", "301", cause="--context 301: the model knows 300 positions", remedy="Give 300 or less")


def test_a_plan_that_does_not_fit_is_refused() -> None:
    from q6k_convert.errors import EnvironmentMissingError, UsageError

    memory = {"weights_bytes": 5 * 10**9, "cache_bytes": 10**9, "context": 4096, "cache_problem": None}
    memory |= {"cache_type": "int8", "prompt_bytes": 10**8}
    assert planned(memory, None) == "memory: 1.00 GB of int8 cache for 4096 tokens"
    expanded = "memory: 5.00 GB of weights and 1.00 GB of int8 cache for 4096 tokens, 100.00 MB more for prompts"
    assert planned(memory, 6100 * 10**6) == f"{expanded}, 6.10 GB are free"
    assert planned(memory, 5 * 10**9, cached=False) == "memory: 5.00 GB of weights, 5.00 GB are free"
    of_both = r"1\.00 GB of GPU memory, 100\.00 MB more for prompts; of 6\.10 GB free, the weights leave 1\.10 GB"
    with pytest.raises(UsageError, match=of_both) as failure:
        planned(memory, 6100 * 10**6 - 1)
    assert failure.value.remedy == "Give a shorter --context."
    memory |= {"cache_type": "model", "prompt_bytes": 0}
    assert planned(memory, None) == "memory: 1.00 GB of cache for 4096 tokens"
    both = "memory: 5.00 GB of weights and 1.00 GB of cache for 4096 tokens, 6.00 GB are free"
    assert planned(memory, 6 * 10**9) == both
    assert planned(memory, None, texts=3) == "memory: 3.00 GB of cache for 3 texts of 4096 tokens"
    assert planned(memory, 5 * 10**9, cached=False) == "memory: 5.00 GB of weights, 5.00 GB are free"
    assert planned(memory, None, cached=False) == ""
    with pytest.raises(
        UsageError, match=r"the cache of 4096 tokens takes 1\.00 GB .* the weights leave 500\.00 MB"
    ):
        planned(memory, 5500 * 10**6)
    with pytest.raises(
        EnvironmentMissingError, match=r"the weights take 5\.00 GB of GPU memory, and 4\.00 GB are free"
    ):
        planned(memory, 4 * 10**9)


def test_what_passes_stop_texts_does_not_depend_on_pieces() -> None:
    """Against the same rule, on the whole text, character by character."""
    rng = random.Random(1)
    for _ in range(400):
        whole = "".join(rng.choices("ab", k=rng.randrange(12)))
        texts = ["".join(rng.choices("ab", k=rng.randrange(1, 4))) for _ in range(rng.randrange(4))]
        ends = [(end, text) for end in range(len(whole) + 1) for text in texts if whole[:end].endswith(text)]
        first = min((end for end, _ in ends), default=None)
        longest = max((len(text) for end, text in ends if end == first), default=0)
        stops, passed, at = StopTexts(texts), "", 0
        while at < len(whole):
            size = rng.randrange(1, 5)
            passed += stops.push(whole[at : at + size])
            assert whole.startswith(passed)
            at += size
        passed += stops.end()
        assert passed == (whole if first is None else whole[: first - longest])
        assert (stops.found is None) == (first is None)
    with pytest.raises(ValueError, match="a stop text is empty"):
        StopTexts(["a", ""])


def test_stop_texts_hold_back_no_more_than_may_begin_one() -> None:
    stops = StopTexts(["</s>", "\n\nUser:"])
    passed = [stops.push(piece) for piece in ("Hi <", "b> there", "\n", "\n", "Us", "ers </", "s> more")]
    assert passed == ["Hi ", "<b> there", "", "", "", "\n\nUsers ", ""]
    assert (stops.found, stops.push("x"), stops.end()) == ("</s>", "", "")
