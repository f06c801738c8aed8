"""JSON of untrusted files, parsed within a bound of memory: a few bytes of text may become a hundred in Python."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from typing import Any

from q6k_kernels.text import shortened

MAX_TOKENS = 1 << 22
"""Limit of the texts, commas and opening brackets of a document; no manifest that is written has as many."""
MAX_TEXT = 1 << 12
"""Limit of a text in characters: a name, a key, a checksum."""
# Never backtracks, which would take memory for each escape of a long text.
_TOKEN = re.compile(rb'[,\[{]|"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def parse(raw: bytes) -> Any:
    """Return the content of a JSON document whose size the caller has bounded.

    Raises:
        ValueError: it is not valid JSON, has a key twice in an object, or more than `MAX_TOKENS` tokens.
    """
    if next(islice(_TOKEN.finditer(raw), MAX_TOKENS, None), None) is not None:
        raise ValueError(f"more than {MAX_TOKENS} texts, commas and opening brackets")
    try:
        return json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("its objects are nested too deeply") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shortened(twice)} appears twice")
    return content
