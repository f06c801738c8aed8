"""Helpers for the texts of errors."""

from __future__ import annotations

from collections.abc import Sequence


def listing(items: Sequence[str], separator: str = ", ", most: int = 10) -> str:
    """Join the first `most` items, and say how many more there are."""
    more = len(items) - most
    return separator.join(items[:most]) + (f"{separator}and {more} more" if more > 0 else "")
