"""Find control tokens in a text, in time that does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, models

from q6k_kernels.tokenizer.vocabulary import encoded


class Finder:
    """A search for tokens by their text: at each place the longest, and none that begins inside another.

    Args:
        tokens: text -> id.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        # An encoder that knows nothing else searches for all of them at once.
        self._encoder = Tokenizer(models.BPE(vocab=dict(tokens), merges=[]))
        self._encoder.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
        self._begins = {ord(token[0]) for token in tokens}

    def find(self, text: str) -> Sequence[tuple[int, int, int]]:
        """Return begin, end and id of each token in the text."""
        found = encoded(self._encoder, text)
        return [(begin, end, token) for (begin, end), token in zip(found.offsets, found.ids, strict=True)]

    def hidden(self, text: str, mark: str) -> str:
        """Return the text with a mark in every token that it contains, behind a character that begins one."""
        if not self.find(text):
            return text
        return text.translate({code: chr(code) + mark for code in self._begins})
