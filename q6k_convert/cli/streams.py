"""The streams of a command: what they can show, a console on each, progress where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO

from q6k_convert import text
from q6k_convert.text import strict_json

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 5.0
"""Between two lines of progress."""
_UNFOLDED = 10_000


class PlainLines:
    """Progress as plain lines, at most one every few seconds."""

    def __init__(self, total: int, what: str, console: Console) -> None:
        self.total, self.what, self.console = total, what, console
        self.done = 0
        self.started = self.last = time.monotonic()

    def add(self, count: int) -> None:
        """Count what has been done, and say so if it is time."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS and self.done > 0:  # it is 0 after a download had to start again
            self.last = now
            parts = 100 * self.done / self.total
            line = f"{self.what}: {text.size(self.done)} of {text.size(self.total)} ({parts:.0f}%)"
            if parts >= 1:  # before, what comes first, like building a model, would be taken for its speed
                rate = self.done / (now - self.started)
                line += f", {text.size(rate)}/s, {text.seconds((self.total - self.done) / rate)} left"
            self.console.print(line, soft_wrap=True)


@contextmanager
def naming_stdout() -> Iterator[None]:
    """Name stdout in an error of writing to it, which has no name of its own."""
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


def json_text(content: Any) -> str:
    """Return strict JSON that stdout can show."""
    return strict_json(content, escaped=not is_utf_8(sys.stdout))


def is_utf_8(stream: TextIO | None) -> bool:
    """Check whether a stream takes any text; one that does not say is taken to."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"


def console(*, stderr: bool, quiet: bool = False) -> Console:
    """Return rich's console of stdout or stderr, without colours of its own choice."""
    from rich.console import Console  # imported here because a quiet command needs none

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with a code of its own

        def print(self, *objects: Any, **options: Any) -> None:
            with nullcontext() if stderr else naming_stdout():
                super().print(*objects, **options)

    # A file or a pipe has no width: a table in it is not folded.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else _UNFOLDED
    return Plain(stderr=stderr, quiet=quiet, width=width, highlight=False, markup=False, emoji=False)
