"""How a file says that its model's tokens are to be drawn: the keys `general.sampling.*`.

llama.cpp's converter copies them from a model's `generation_config.json`. A key that is absent leaves its setting
to the caller. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.bundle.metadata import Metadata

_PREFIX = "general.sampling."
_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "penalty_repeat",
    "repeat_last": "penalty_last_n",
}
"""Field of `StatedSampling` -> its key."""
_OTHER_WAYS = ("sequence", "xtc_probability", "mirostat")
"""Keys of ways to draw tokens that are not built; 0 and "" turn them off."""
_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 to 100", lambda value: 0 <= value <= 100),
    "top_p": ("0 to 1", lambda value: 0 <= value <= 1),
    "min_p": ("0 to 1", lambda value: 0 <= value <= 1),
    "repeat_penalty": ("0.01 to 100", lambda value: 0.01 <= value <= 100),
}
"""Ranges of the options of the same names, within which logits stay finite in float32."""
_MOST = 1 << 24
"""Limit of a count, more than any vocabulary or text has."""


@dataclass(frozen=True)
class StatedSampling:
    """What a file states, None where it states nothing.

    Attributes:
        temperature: 0 for the likeliest token.
        top_k: number of likeliest tokens to draw from; 0 for all.
        top_p: share of the probability that the tokens to draw from have together.
        min_p: least probability of a token, as a share of the likeliest one's.
        repeat_penalty: factor against tokens that the text has already; 1 for none.
        repeat_last: number of last tokens that the penalty looks at; -1 for the whole text.
        not_built: keys of further ways to draw that the file asks for.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last: int | None = None
    not_built: tuple[str, ...] = ()

    @property
    def stated(self) -> dict[str, float]:
        """The settings that the file states, by their fields."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name in _KEYS}
        return {name: value for name, value in found.items() if value is not None}


def sampling_key(field: str) -> str:
    """Return the key of a field of `StatedSampling`."""
    return _PREFIX + _KEYS[field]


def stated_sampling(metadata: Metadata) -> StatedSampling:
    """Read the settings of a file.

    Raises:
        BundleError: a value is of the wrong type or out of its range.
    """
    return StatedSampling(
        **{field: _real(metadata, field) for field in _RULES},
        top_k=_count(metadata, "top_k", 0),
        repeat_last=_count(metadata, "repeat_last", -1),
        not_built=tuple(_PREFIX + name for name in _OTHER_WAYS if metadata.value(_PREFIX + name)),
    )


def _real(metadata: Metadata, field: str) -> float | None:
    value = metadata.real(sampling_key(field))
    words, holds = _RULES[field]
    if value is not None and not holds(value):
        raise BundleError(f"{metadata.path}: {sampling_key(field)}: expected {words}, found {value:g}")
    return value


def _count(metadata: Metadata, field: str, least: int) -> int | None:
    """Read a whole number; all below `least` mean the same as it, all tokens, as does whatever is above `_MOST`."""
    value = metadata.integer(sampling_key(field))
    return None if value is None else min(max(value, least), _MOST)
