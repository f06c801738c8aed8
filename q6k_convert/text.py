"""Format sizes, times, shapes and file names for people, and documents for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {unit + "I": 1024**power for power, unit in enumerate("KMGT", 1)}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?I?)(B?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that a text like `5GB` (decimal), `512MiB` (binary) or `1000000B` names.

    Raises:
        ValueError: the text is not a size, or has no unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 5GB, 512MiB or 1000000B")
    if not match[2] and not match[3]:
        raise ValueError(f"{text!r} has no unit; write {match[1]}GB, or {match[1]}B for bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size(nbytes: float) -> str:
    """Return a number of bytes with a decimal unit: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def seconds(duration: float) -> str:
    """Return a duration in seconds as `0.42 s`, `12.3 s` or `3:05 min`."""
    if duration < 60:
        return f"{duration:.2f} s" if duration < 10 else f"{duration:.1f} s"
    return f"{int(duration) // 60}:{int(duration) % 60:02d} min"


def displayable(text: str) -> str:
    """Return a text that UTF-8 can encode; bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def shape(dims: Sequence[int]) -> str:
    """Return a shape as `4096×11008`, or `scalar`."""
    return "×".join(map(str, dims)) or "scalar"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 tensor`, `2 tensors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def strict_json(content: Any, *, escaped: bool = False) -> str:
    """Return strict JSON, which has no NaN and no infinity: they are written as text.

    Args:
        content: what to write.
        escaped: whether only ASCII is written, and all else as escapes.
    """
    return displayable(json.dumps(_strict(content), indent=1, ensure_ascii=escaped, allow_nan=False))


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(content, "NaN")
    return content
