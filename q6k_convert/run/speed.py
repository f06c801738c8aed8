"""Time a model's prompts and decoding steps, by the clocks of the host and of the GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from q6k_kernels.generate.generator import Generator

Work = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round, by the clock of the host and by that of the GPU, which the CPU has none of."""

    ms: list[float] = field(default_factory=list)
    gpu_ms: list[float] = field(default_factory=list)


def times_of(work: Work, before: Work, rounds: int, device: torch.device) -> Times:
    """Time some work; `before` runs before each round and does not count."""
    times, on_gpu = Times(), device.type == "cuda"
    for _ in range(rounds):
        before()
        wait(device)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * on_gpu)]  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        if marks:
            marks[0].record()
        work()
        if marks:
            marks[1].record()
        wait(device)
        times.ms.append((time.perf_counter() - start) * 1e3)
        if marks:
            times.gpu_ms.append(marks[0].elapsed_time(marks[1]))
    return times


def wait(device: torch.device) -> None:
    """Wait until a device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_ids(count: int, vocabulary: int) -> list[int]:
    """Return so many token ids, always the same."""
    ids = random.Random(count)  # noqa: S311 -- any will do
    return [ids.randrange(vocabulary) for _ in range(count)]


def decoding(generator: Generator, text: list[int], tokens: int) -> tuple[Work, Work]:
    """Return what decodes so many tokens after a text, and what has to run before it.

    Each token is the likeliest, none ends the answer, and the host reads them as they come. Recording the steps
    belongs to what runs before.
    """
    count = tokens + 1  # the prompt itself chooses the first

    def before() -> None:
        generator.reset()
        generator.prefill(text)
        generator.prepare(count)

    def decode() -> None:
        for _ in generator.generate(count):
            pass

    return decode, before


def prompting(generator: Generator, prompt: list[int], text: list[int] | None = None) -> tuple[Work, Work]:
    """Return what processes a prompt up to its logits, after a text if there is one, and what runs before it."""

    def before() -> None:
        generator.reset()
        if text:
            generator.prefill(text)

    return lambda: generator.prefill(prompt), before
