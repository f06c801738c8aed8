"""Helpers for the texts of errors."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_MOST_CHARACTERS = 200
_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxlong = _MOST_CHARACTERS


def listing(items: Sequence[str], separator: str = ", ", most: int = 10) -> str:
    """Join the first `most` items, and say how many more there are."""
    more = len(items) - most
    return separator.join(items[:most]) + (f"{separator}and {more} more" if more > 0 else "")


def shortened(value: Any) -> str:
    """Return a value from a file as errors show it: quoted, and of a long one the beginning."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]!r}…"
    return _SHORT.repr(value)
