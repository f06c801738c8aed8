"""The name of a file in the errors of reading and writing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError that has none, as those of open files do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise
