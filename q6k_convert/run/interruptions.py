"""Ctrl-C in a chat: it stops what the model is doing, not the program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StoppedError(KeyboardInterrupt):
    """Interruption of one part of a chat.

    A KeyboardInterrupt is not an Exception, so libraries that catch every Exception let it pass.
    """


class Interruptions:
    """A handler of SIGINT, in force from entering to leaving; only where the signal is not ignored.

    Outside of `stopping` and `noting` a signal goes to the handler that was there before, which ends the program.
    So does a second one in `noting`, for a user whom the first did not help.

    Attributes:
        asked: whether a signal has arrived in the last `noting`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handle: Callable[[], None] | None = None
        self._before: Any = None

    def __enter__(self) -> Interruptions:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Raise StoppedError at a signal inside the context."""
        with self._by(self._stop):
            yield

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Only note a signal inside the context, in `asked`."""
        self.asked = False
        with self._by(self._note):
            yield

    @contextmanager
    def _by(self, handle: Callable[[], None]) -> Iterator[None]:
        self._handle = handle
        try:
            yield
        finally:
            self._handle = None

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._handle is None or (self._handle == self._note and self.asked):
            self._before(number, frame)
        else:
            self._handle()

    def _stop(self) -> None:
        raise StoppedError

    def _note(self) -> None:
        self.asked = True
