"""Decoding several steps at once, on the CPU, and recording them with a stand-in for CUDA's graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from families import PROMPT, prompt, tiny
from q6k_kernels.generate import kv_cache, mailbox, recording
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.recording import TOGETHER, Recorder
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_reference import TokenChoice

MOST = 45

pytestmark = pytest.mark.usefixtures("one_thread")


def made(capacity: int = 200, temperature: float = 0.0) -> Generator:
    generator = Generator(tiny("gemma3"), capacity=capacity, temperature=temperature, seed=4, fused=True)
    generator.prefill(prompt())
    return generator


@lru_cache
def one_by_one(temperature: float) -> list[int]:
    return list(made(temperature=temperature).generate(MOST))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(mailbox.Mailbox, "lag", mailbox.LAG)


def watched(generator: Generator, together: int) -> list[int]:
    """Lets it run so many at once; how many it does each time."""
    counts, steps = list[int](), generator._steps
    generator._recorder.together = together

    def watch(position: int, count: int = 1) -> Callable[[], object]:
        def run() -> None:
            assert int(generator.cache.position) == position
            counts.append(count)
            steps(position, count)()

        return run

    generator._steps = watch  # type: ignore[method-assign]
    return counts


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("together", [1, 3, TOGETHER])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 15, 16, 17, 23, 24, 31, MOST])
def test_tokens_are_those_of_single_steps(together: int, tokens: int) -> None:
    """Up to the last place of the cache, and not past it."""
    generator = made(PROMPT + tokens)
    counts = watched(generator, together)
    assert list(generator.generate(tokens)) == one_by_one(0.0)[:tokens]
    assert sum(counts) == tokens - 1
    assert (generator.length, generator.stop_reason) == (PROMPT + tokens, "length")
    if together == TOGETHER:
        assert counts.count(TOGETHER) == max(0, tokens // TOGETHER - 1)
        assert counts[: TOGETHER - 1] == [1] * min(TOGETHER - 1, tokens - 1)


@pytest.mark.usefixtures("late")
def test_choices_by_chance_are_the_same_too() -> None:
    generator = made(temperature=1.5)
    counts = watched(generator, TOGETHER)
    assert list(generator.generate(MOST)) == one_by_one(1.5)
    assert TOGETHER in counts
    assert one_by_one(1.5) != one_by_one(0.0)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("end", [3, 8, 12, 15, 16, 30])
def test_text_goes_on_after_an_answer_that_ends_within_several_steps(end: int) -> None:
    """Which are some too many, and leave no trace; of a ring's slots neither."""
    answer = one_by_one(0.0)
    end = answer.index(answer[end])
    generator = made()
    counts = watched(generator, TOGETHER)
    assert list(generator.generate(150, stop={answer[end]})) == answer[:end]
    assert (generator.length, generator.stop_reason) == (PROMPT + end + 1, "stop")
    assert end <= sum(counts) <= end + mailbox.LAG + TOGETHER
    assert TOGETHER in counts
    other = made()
    list(other.generate(end + 1))
    for each in (generator, other):
        each._recorder.together = TOGETHER
        each.prefill([3, 4])
    assert torch.equal(generator.cache.position, other.cache.position)
    assert list(generator.generate(20)) == list(other.generate(20))


@pytest.mark.usefixtures("late")
def test_the_device_has_work_while_tokens_are_read() -> None:
    generator = made()
    counts = watched(generator, TOGETHER)
    for read, _ in enumerate(generator.generate(100), 1):
        ahead = 1 + sum(counts) - read
        assert mailbox.LAG <= ahead < mailbox.LAG + TOGETHER or 1 + sum(counts) == 100
    assert read == 100


def test_a_cpu_runs_them_one_by_one() -> None:
    generator = made()
    counts = watched(generator, 1)
    assert list(generator.generate(MOST)) == one_by_one(0.0)
    assert set(counts) == {1}
    assert Generator(tiny("gemma3"), capacity=9, fused=True)._recorder.together == 1


@pytest.mark.parametrize(("tokens", "several"), [(2, False), (15, False), (16, True), (100, True)])
def test_what_will_be_run_is_prepared(tokens: int, several: bool) -> None:
    generator = made()
    generator._recorder.together = TOGETHER
    generator.prepare(tokens)
    slots = generator.cache.slots
    assert set(generator._recorder.made) == {(slots, 1), *([(slots, TOGETHER)] if several else [])}
    assert int(generator.cache.position) == PROMPT


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("few", [PROMPT + 1, 35, 40, 48, PROMPT + MOST - 1, PROMPT + MOST])
def test_nothing_is_recorded_within_an_answer(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the steps of many slots begin, also in the middle of what is run at once."""
    monkeypatch.setitem(kv_cache.FEW_SLOTS, "model", few)
    generator = made()
    generator._recorder.together = TOGETHER
    generator.prepare(MOST)
    before = set(generator._recorder.made)
    assert list(generator.generate(MOST)) == one_by_one(0.0)
    assert set(generator._recorder.made) == before


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("capacity", [PROMPT + 12, 40, 41, 42, 48, 200])
def test_no_answer_of_a_conversation_records_anything(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared once, for a text of one token, however far the cache reaches."""
    monkeypatch.setitem(kv_cache.FEW_SLOTS, "model", 40)
    generator = Generator(tiny("gemma3"), capacity=capacity, fused=True)
    generator._recorder.together = TOGETHER
    generator.prefill([0])
    generator.prepare()
    # The last token of a full cache is never the input of a step.
    reaches = [40, *([generator.cache.slots] if capacity - 1 > 40 else [])]
    forms = {(reach, count) for reach in reaches for count in (1, TOGETHER)}
    assert set(generator._recorder.made) == forms
    generator.reset()
    generator.prefill(prompt())
    while (room := capacity - generator.length) > 1:
        list(generator.generate(min(room - 1, 17)))
        generator.prefill([5])
    assert set(generator._recorder.made) == forms


def test_a_full_cache_needs_no_steps() -> None:
    generator = Generator(tiny("gemma3"), capacity=PROMPT, fused=True)
    generator.prefill(prompt())
    generator.prepare()
    assert not generator._recorder.made


@pytest.mark.parametrize("together", [1, 8])
def test_few_slots_have_steps_of_their_own(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to few slots has other blocks; of a kind the first step is one alone, which compiles kernels."""
    monkeypatch.setitem(kv_cache.FEW_SLOTS, "model", 24)
    reaches, advance = list[int](), Step.advance

    def watch(step: Step, choice: TokenChoice, reach: int | None = None) -> None:
        assert reach is not None
        assert int(choice.position) < reach
        reaches.append(reach)
        advance(step, choice, reach)

    monkeypatch.setattr(Step, "advance", watch)
    generator = made()
    slots = generator.cache.slots
    generator._recorder.together = together
    monkeypatch.setattr(mailbox.Mailbox, "lag", mailbox.LAG)
    assert list(generator.generate(MOST)) == one_by_one(0.0)
    assert reaches == sorted(reaches)
    assert set(reaches) == {24, slots}
    in_order = list(generator._recorder.made)
    assert all((keys, 1) in in_order[:at] for at, (keys, count) in enumerate(in_order) if count > 1)


class Graphs:
    """What of `torch.cuda` records and measures: steps are numbers added to a state."""

    def __init__(self, milliseconds: float) -> None:
        self.state, self.ran, self.inside = State(5), 0, 0
        self.capturing: Graph | None = None
        stream = SimpleNamespace(wait_stream=lambda other: None)
        event = SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: milliseconds
        )
        self.cuda = SimpleNamespace(
            Stream=lambda device: stream,
            stream=lambda stream: nullcontext(),
            current_stream=lambda: stream,
            synchronize=lambda: None,
            device=lambda device: nullcontext(),
            Event=lambda enable_timing: event,
            CUDAGraph=lambda: Graph(self),
            graph_pool_handle=lambda: "pool",
            graph=self._capture,
        )

    @contextmanager
    def _capture(self, graph: Graph, pool: str) -> Iterator[None]:
        assert pool == "pool"
        self.capturing = graph
        yield
        self.capturing = None

    @contextmanager
    def within(self) -> Iterator[None]:
        self.inside += 1
        yield
        self.inside -= 1

    def step(self, keys: int) -> None:
        assert keys == 40
        assert self.inside == 1
        if self.capturing is not None:
            self.capturing.steps += 1
        else:
            self.run(1)

    def run(self, steps: int) -> None:
        self.state.value += steps
        self.ran += steps


class Graph:
    def __init__(self, graphs: Graphs) -> None:
        self.steps, self._graphs = 0, graphs

    def replay(self) -> None:
        self._graphs.run(self.steps)


class State:
    device = SimpleNamespace(type="cuda")

    def __init__(self, value: int) -> None:
        self.value = value

    def clone(self) -> State:
        return State(self.value)

    def copy_(self, other: State) -> None:
        self.value = other.value


@pytest.mark.parametrize(
    ("several", "milliseconds", "together"),
    [(True, 0.01, TOGETHER), (True, 6.2, TOGETHER), (True, 6.3, 1), (True, 300.0, 1), (False, 0.01, 1)],
)
def test_short_steps_are_recorded_several_in_a_row(
    several: bool, milliseconds: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: Any = Graphs(milliseconds)
    monkeypatch.setattr(recording, "torch", graphs)
    recorder = Recorder(lambda: (graphs.state,), several=several)
    assert recorder.together == 1
    single = recorder.form(graphs.step, 40, 1, graphs.within)
    assert graphs.state.value == 5  # it was run and measured, and has left no trace
    assert recorder.together == together
    single()
    assert graphs.state.value == 6
    ran = graphs.ran
    more = recorder.form(graphs.step, 40, together, graphs.within)
    assert (graphs.state.value, graphs.ran) == (6, ran)
    more()
    assert graphs.state.value == 6 + together
    assert recorder.form(graphs.step, 40, 1, graphs.within) == single
    assert recorder.form(graphs.step, 40, together, graphs.within) == more
