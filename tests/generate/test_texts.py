"""Several texts at once on the CPU: each has the tokens that it has alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest

from families import VOCABULARY, expected, prompt, tiny

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate import kv_cache, mailbox, texts
from q6k_kernels.generate.checking import CapacityError, NotFiniteError
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.generate.texts import NoPlaceError, Text, Texts

CAPACITY = 120
FILTERS = (None, Filters(top_k=9), Filters(9, 0.9, 0.1, 1.5), Filters(repeat_penalty=1.3, repeat_last=7))
JOBS: list[tuple[int, int, dict[str, Any]]] = [
    (3 + 4 * at, 4 + 15 * at % 22, {"temperature": 0.8 * (at % 3 == 1), "seed": at, "filters": FILTERS[at % 4]})
    for at in range(7)
]
"""Lengths of prompt and answer, and settings. Windows are of 8 tokens, so rings wrap."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def alone(family: str, job: int) -> list[int]:
    length, limit, settings = JOBS[job]
    generator = Generator(tiny(family), capacity=CAPACITY, fused=True, **settings)
    generator.prefill(prompt(length))
    return list(generator.generate(limit))


def answers(run: Texts, jobs: list[tuple[int, int, dict[str, Any]]]) -> list[list[int]]:
    """Let texts join as soon as there is room, until all have ended."""
    found, names, todo = [list[int]() for _ in jobs], dict[Text, int](), list(enumerate(jobs))
    while todo or run.here:
        while todo and run.free:
            at, (length, limit, settings) = todo.pop(0)
            names[run.join(prompt(length), limit, **settings)] = at
        for text, token in run.step():
            if token is None:
                assert text.stop_reason is not None
                assert text not in run.here
            else:
                found[names[text]].append(token)
    assert run.free == run.places
    assert all(text.length == jobs[at][0] + jobs[at][1] for text, at in names.items())
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4"])
def test_tokens_are_those_of_each_text_alone(family: str) -> None:
    run = Texts(tiny(family), capacity=CAPACITY, places=3)
    assert answers(run, JOBS) == [alone(family, job) for job in range(len(JOBS))]


def test_a_cache_of_8_bits_has_places_too() -> None:
    run, expected_answers = Texts(tiny("gemma3"), capacity=CAPACITY, places=2, cache_type="int8"), []
    for length, limit, settings in JOBS[:4]:
        generator = Generator(tiny("gemma3"), capacity=CAPACITY, fused=True, cache_type="int8", **settings)
        generator.prefill(prompt(length))
        expected_answers.append(list(generator.generate(limit)))
    assert answers(run, JOBS[:4]) == expected_answers


@pytest.mark.parametrize(("places", "lag"), [(1, 0), (7, 0), (5, 2)])
def test_tokens_do_not_depend_on_how_many_there_are(places: int, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how late they are read: with a lag, as on a GPU, texts join while steps are under way."""
    monkeypatch.setattr(mailbox.StepsMailbox, "lag", lag)
    run = Texts(tiny("gemma3"), capacity=CAPACITY, places=places, chunk=9)
    assert answers(run, JOBS) == [alone("gemma3", job) for job in range(len(JOBS))]
    rows = {rows for recorder in run._recorders.values() for rows, _ in recorder.made}
    assert rows <= {1, 2, 4, places}
    assert max(rows) == places


@pytest.mark.parametrize("lag", [0, 2])
def test_few_slots_have_steps_of_their_own(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the longest text is short, and again once that has left."""
    few = 26
    monkeypatch.setitem(kv_cache.FEW_SLOTS, "model", few)
    monkeypatch.setattr(mailbox.StepsMailbox, "lag", lag)
    seen, advance = list[tuple[int, int]](), Step.advance_texts

    def watch(step: Step, choice: TextsChoice, reach: int | None = None) -> None:
        assert reach is not None
        seen.append((int(choice.position[choice.places].max()), reach))
        advance(step, choice, reach)

    monkeypatch.setattr(Step, "advance_texts", watch)
    run, jobs = Texts(tiny("gemma3"), capacity=CAPACITY, places=2), (1, 2, 6, 0)
    assert answers(run, [JOBS[job] for job in jobs]) == [alone("gemma3", job) for job in jobs]
    slots = run._cache.slots
    assert all(reach == (few if position < few else slots) for position, reach in seen)
    assert [reach for reach, _ in groupby(reach for _, reach in seen)] == [few, slots, few]


@pytest.mark.parametrize("lag", [0, 2])
def test_a_stop_token_ends_a_text_and_is_not_given(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox.StepsMailbox, "lag", lag)
    best = expected("llama")
    end = best.index(best[12])
    run = Texts(tiny("llama"), capacity=CAPACITY, places=2)
    stopping, other = run.join(prompt(), 40, stop={best[12]}), run.join(prompt(), 30)
    pairs = list[tuple[Text, int | None]]()
    while stopping.stop_reason is None:
        pairs += run.step()
    assert [token for text, token in pairs if text is stopping] == [*best[:end], None]
    assert (stopping.stop_reason, stopping.length, run.here, run.free) == ("stop", 21 + end + 1, [other], 1)
    # The steps that it took in vain leave no trace in its place.
    third = run.join(prompt(9), 20)
    while run.here:
        pairs += run.step()
    assert [token for text, token in pairs if text is other] == [*best[:30], None]
    generator = Generator(tiny("llama"), capacity=CAPACITY)
    generator.prefill(prompt(9))
    assert [token for text, token in pairs if text is third] == [*generator.generate(20), None]
    assert run.step() == []


def test_the_first_token_may_be_the_last() -> None:
    best = expected("llama")
    run = Texts(tiny("llama"), capacity=CAPACITY, places=2)
    one, none = run.join(prompt(), 1), run.join(prompt(), 9, stop=[best[0]])
    assert (one.stop_reason, none.stop_reason, run.free) == ("length", "stop", 2)
    assert run.here == [one, none]
    assert run.step() == [(one, best[0]), (one, None), (none, None)]
    assert run.here == []


def test_texts_leave() -> None:
    run = Texts(tiny("llama"), capacity=CAPACITY, places=2)
    gone, stays = run.join(prompt(), 40), run.join(prompt(), 12)
    run.leave(gone)
    assert (gone.stop_reason, run.free, run.here) == ("left", 1, [stays])
    late = run.join(prompt(7), 1)
    run.leave(late)  # which has ended: what was not returned yet is dropped
    assert late.stop_reason == "length"
    found = list[tuple[Text, int | None]]()
    while run.here:
        found += run.step()
    assert found == [*((stays, token) for token in expected("llama")[:12]), (stays, None)]


def test_suppressed_tokens_are_never_chosen() -> None:
    best = expected("llama")
    run = Texts(tiny("llama"), capacity=CAPACITY, places=3)
    assert answers(run, [(21, 20, {}), (21, 20, {"suppressed": set(best[:20])})])[0] == best[:20]
    other = answers(run, [(21, 20, {"suppressed": set(best[:20])}), (21, 20, {})])
    assert not set(other[0]) & set(best[:20])
    assert other[1] == best[:20]


def test_tokens_that_the_model_suppresses(monkeypatch: pytest.MonkeyPatch) -> None:
    best = expected("llama")
    monkeypatch.setattr(tiny("llama").generation_config, "suppress_tokens", best[:3])
    generator = Generator(tiny("llama"), capacity=CAPACITY)
    generator.prefill(prompt())
    run = Texts(tiny("llama"), capacity=CAPACITY, places=2)
    assert answers(run, [(21, 20, {}), (21, 20, {"suppressed": [5]})])[0] == list(generator.generate(20))


def test_what_cannot_join_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Texts(tiny("llama"), capacity=CAPACITY, places=2)
    text = run.join(prompt(), 30)
    for ids, limit, more in (
        (prompt(), 0, {}),
        (prompt(), 5, {"temperature": -1.0}),
        (prompt(), 5, {"seed": -1}),
        (prompt(), 5, {"suppressed": [VOCABULARY]}),
        (prompt(), 5, {"suppressed": range(VOCABULARY)}),
    ):
        with pytest.raises(ValueError, match="expected a limit of 1 or more"):
            run.join(ids, limit, **more)
    with pytest.raises(ValueError, match=f"expected one or more of 0 to {VOCABULARY - 1}, found none"):
        run.join([], 5)
    with pytest.raises(CapacityError, match="121 tokens, and the cache holds 120"):
        run.join(prompt(), 100)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "check_finite", lambda logits, dtype: (_ for _ in ()).throw(NotFiniteError("no", "")))
        with pytest.raises(NotFiniteError):
            run.join(prompt(), 5)
    assert run.free == 1
    second = run.join(prompt(), 5)
    with pytest.raises(NoPlaceError, match="all 2 places are taken"):
        run.join(prompt(), 5)
    found = list[tuple[Text, int | None]]()
    while run.here:
        found += run.step()
    for each, limit in ((text, 30), (second, 5)):
        assert [token for by, token in found if by is each] == [*expected("llama")[:limit], None]


class LateCopy:
    """Pinned memory that a copy reaches when its event is waited for, in the place of `torch` in `mailbox`."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(Event=lambda: self, current_stream=lambda device: "steps")
        self._started, self._recorded = list[tuple[Any, Any]](), list[int]()

    def empty(self, shape: Any, dtype: Any, pin_memory: bool) -> Any:
        assert pin_memory
        host = torch.zeros(shape, dtype=dtype)
        return SimpleNamespace(copy_=lambda source, non_blocking: self._copy(host, source), tolist=host.tolist)

    def _copy(self, host: Any, source: Any) -> None:
        self._started.append((host, source.clone()))

    def record(self, stream: str) -> None:
        assert stream == "steps"
        self._recorded.append(len(self._started))

    def synchronize(self) -> None:
        for host, source in self._started[: self._recorded.pop(0)]:
            host.copy_(source)


def test_a_gpus_tokens_are_those_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "torch", LateCopy())
    token = torch.tensor([5, 0, 7])
    box = mailbox.GpuStepsMailbox(token)
    for step in range(box.lag + 1):
        token += step
        box.post()
    assert len(box) == box.lag + 1
    assert [box.read() for _ in range(3)] == [[5, 0, 7], [6, 1, 8], [8, 3, 10]]
    assert len(box) == 0


def test_models_that_continue_one_text_at_a_time_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="states of gated delta nets continues one text at a time"):
        Texts(tiny("qwen35"), capacity=9)
    other = type(tiny("llama"))(tiny("llama").config)
    with pytest.raises(UnsupportedModelError, match="that load_model has not made") as caught:
        Texts(other, capacity=9)
    assert "one after the other" in str(caught.value.remedy)
    with pytest.raises(ValueError, match="1 to 32 places; found 9, 2048 and 33"):
        Texts(tiny("llama"), capacity=9, places=33)
    assert Texts(tiny("llama"), capacity=9, places=2).nbytes == 2 * 3 * 2 * 2 * 16 * 8 * 4
