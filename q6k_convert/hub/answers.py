"""Bounds of what the Hub's answers may cost: bodies, and time.

huggingface_hub reads the body of every redirection, and unpacks what is compressed. Neither is needed here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, TypeVar

from q6k_convert.errors import IOFailedError
from q6k_convert.hub.names import Reference

MAX_LISTING = 64 << 20
"""Limit of the bytes of a repository's listing: 100,000 files take less."""
ANSWER_SECONDS = 120.0
"""Time for a listing or a file's headers, with all repetitions."""
START_SECONDS, SLOWEST = 600.0, 10_000
"""A file may take as many seconds, and one more for as many bytes."""

T = TypeVar("T")


def guard(reference: Reference) -> None:
    """Bound the answers to all later requests of huggingface_hub's client in this process."""
    from huggingface_hub import get_session

    session = get_session()
    session.headers["Accept-Encoding"] = "identity"
    kept = [hook for hook in session.event_hooks["response"] if not isinstance(hook, _Guard)]
    session.event_hooks = session.event_hooks | {"response": [*kept, _Guard(reference)]}


def within(reference: Reference, address: str, call: Callable[[], T]) -> T:
    """Return what a call returns, in a thread of its own, or give it up.

    Raises:
        IOFailedError: it takes longer than `ANSWER_SECONDS`.
    """
    results, errors = list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise reference.absent(
            IOFailedError,
            f"{address} has not answered in {ANSWER_SECONDS:g} s",
            "Run the same command again later.",
        )
    return results[0]


def in_time(name: str, size: int, tell: Callable[[int], None]) -> Callable[[int], None]:
    """Return `tell` with a limit of the time that a file of this size may take, from now on.

    Raises (from what is returned):
        IOFailedError: the time is over.
    """
    ends = time.monotonic() + START_SECONDS + size / SLOWEST

    def told(count: int) -> None:
        if time.monotonic() > ends:
            raise IOFailedError(
                f"{name}: it comes more slowly than {SLOWEST // 1000} kB a second",
                "Run the same command again later.",
            )
        tell(count)

    return told


class _Guard:
    """A hook for responses whose body has not been read."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def __call__(self, response: Any) -> None:
        library = import_module(type(response).__module__.partition(".")[0])  # httpx or httpx2
        if response.is_redirect:
            response.stream.close()
            response.stream = library.ByteStream(b"")
            response.headers.pop("Content-Encoding", None)
        elif response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._reference.malformed("it is compressed, which was not asked for")
        elif response.request.url.path.startswith("/api/"):
            response.stream = _bounded(library.SyncByteStream, response.stream, self._reference)


def _bounded(base: type, stream: Any, reference: Reference) -> Any:
    """Return a stream, of the client's class, that ends with an error past `MAX_LISTING` bytes."""

    class Bounded(base):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            total = 0
            for piece in stream:
                total += len(piece)
                if total > MAX_LISTING:
                    raise reference.malformed(f"a listing of more than {MAX_LISTING} bytes")
                yield piece

        def close(self) -> None:
            stream.close()

    return Bounded()
