"""Texts that end an answer, found across the pieces in which it arrives."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """A filter of an answer's pieces: they pass as soon as they cannot begin a stop text any more.

    What passes in all is the answer up to the stop text that ends first, of several that end there the longest. It
    does not depend on where one piece ends and the next begins.

    Attributes:
        found: the stop text that ended the answer; None before.

    Args:
        texts: the stop texts, none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if not all(texts):
            raise ValueError("a stop text is empty")
        self.found: str | None = None
        self._texts = tuple(texts)
        self._held = ""

    def push(self, piece: str) -> str:
        """Return what the answer surely has; nothing once a stop text was found."""
        if self.found is not None:
            return ""
        held = self._held + piece
        places = [(held.find(text) + len(text), -len(text), text) for text in self._texts if text in held]
        if places:
            end, _, self.found = min(places)
            self._held = ""
            return held[: end - len(self.found)]
        sure = len(held) - self._begun(held)
        self._held = held[sure:]
        return held[:sure]

    def end(self) -> str:
        """Return what was held back, as the answer has ended without a stop text."""
        held, self._held = self._held, ""
        return held

    def _begun(self, held: str) -> int:
        """Return the most characters at the end that may begin a stop text."""
        longest = max((len(text) for text in self._texts), default=1) - 1
        counts = range(min(longest, len(held)), 0, -1)
        return next((n for n in counts if any(text.startswith(held[-n:]) for text in self._texts)), 0)
