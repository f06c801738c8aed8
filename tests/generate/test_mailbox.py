"""Tokens on their way to the host: in order, and none looked at before it has arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from q6k_kernels.generate import mailbox
from q6k_kernels.generate.mailbox import GpuMailbox, Mailbox

TOKENS = [7, 0, 5, 5, 3, 9, 2, 8, 1, 6, 4, 11]
POSTS = [(2, 1), (3, 1), (4, 4), (8, 2), (10, 1)]
"""Position and number of tokens."""


def read_late(box: Mailbox) -> list[int]:
    """Two posts stay ahead of what is read."""
    found, posted, read = [], 0, 0
    for at, count in POSTS:
        box.post(at, count)
        posted += count
        while posted - read > 5:
            found.append(box.read())
            read += 1
    return found + [box.read() for _ in range(posted - read)]


def test_tokens_come_one_by_one_in_order() -> None:
    assert read_late(Mailbox(torch.tensor(TOKENS))) == TOKENS[2:11]
    box = Mailbox(torch.tensor(TOKENS))
    box.post(5)
    assert box.read() == TOKENS[5]


class LateDevice:
    """A stream that does nothing before someone waits for it, in the place of `torch` in `mailbox`."""

    def __init__(self) -> None:
        self.queue, self.copies, self.waits, self.entered = list[Callable[[], None]](), 0, 0, False
        self.cuda = SimpleNamespace(
            Stream=lambda device: self,
            Event=lambda: Event(self),
            stream=self._on,
            current_stream=lambda device: "steps",
        )

    def zeros(self, shape: Any, dtype: Any, pin_memory: bool) -> PinnedMemory:
        assert pin_memory
        return PinnedMemory(self, torch.zeros(shape, dtype=dtype))

    @contextmanager
    def _on(self, stream: LateDevice) -> Iterator[None]:
        assert stream is self
        self.entered = True
        yield
        self.entered = False

    def wait_stream(self, other: str) -> None:
        assert other == "steps"
        self.waits += 1

    def run(self, until: int) -> None:
        while self.queue and self.copies - len(self.queue) < until:
            self.queue.pop(0)()

    def synchronize(self) -> None:
        self.run(self.copies)


class Event:
    def __init__(self, device: LateDevice) -> None:
        self._device, self._at = device, 0

    def record(self) -> None:
        assert self._device.entered
        self._at = self._device.copies

    def synchronize(self) -> None:
        assert self._at
        self._device.run(self._at)


class PinnedMemory:
    def __init__(self, device: LateDevice, memory: Any) -> None:
        self._device, self._memory = device, memory

    def __getitem__(self, at: Any) -> Any:
        return Part(self._device, self._memory[at]) if isinstance(at, slice) else self._memory[at]


class Part:
    def __init__(self, device: LateDevice, memory: Any) -> None:
        self._device, self._memory = device, memory

    def copy_(self, source: Any, non_blocking: bool) -> None:
        assert non_blocking
        assert self._device.entered
        assert self._device.waits == self._device.copies + 1  # for the steps that were just started
        self._device.copies += 1
        self._device.queue.append(lambda: self._memory.copy_(source))


def test_a_gpus_tokens_are_waited_for_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device, chosen = LateDevice(), torch.tensor(TOKENS)
    monkeypatch.setattr(mailbox, "torch", device)
    assert read_late(GpuMailbox(chosen)) == TOKENS[2:11]
    assert device.copies == len(POSTS)  # one for each post, however many tokens it has
    box = GpuMailbox(chosen)
    device.copies = device.waits = 0
    box.post(0, 3)
    box.post(3, 3)
    assert [box.read() for _ in range(3)] == TOKENS[:3]
    assert len(device.queue) == 1  # the second is not under way yet
    box.close()
    assert not device.queue
    assert [box.read() for _ in range(3)] == TOKENS[3:6]
