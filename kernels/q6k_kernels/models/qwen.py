"""Qwen 2, 2.5 and 3 without mixtures of experts, and the text part of their VL: transformers' qwen2 and qwen3.

The models of text and images divide the angles of rotary embeddings into sections, of positions in time, height and
width. These are equal in a text, so the sections change nothing.
"""

from __future__ import annotations

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import SECTIONS, Keys, Shapes, scaled_rope
from q6k_kernels.models.layer import HeadNorms


def _check_sections(keys: Keys) -> None:
    sections = keys.value(SECTIONS)
    if not isinstance(sections, list) or any(sections[3:]):
        raise keys.wrong(SECTIONS, f"expected three numbers and perhaps a zero, found {str(sections)[:80]}")


def _qwen2vl(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    _check_sections(keys)
    return _qwen2(keys, shapes, values)


def _qwen3vl(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    _check_sections(keys)
    return _qwen3(keys, shapes, values)


def _qwen2(keys: Keys, _shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen2", {"rope_parameters": scaled_rope(keys)}


def _qwen3(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen3", {"rope_parameters": scaled_rope(keys)} | biases(shapes)


_SECTIONS = frozenset({SECTIONS})
ROWS = (
    Architecture("qwen2", _qwen2),
    Architecture("qwen2vl", _qwen2vl, used=_SECTIONS),
    Architecture("qwen3", _qwen3, head_norms=HeadNorms()),
    Architecture("qwen3vl", _qwen3vl, used=_SECTIONS, head_norms=HeadNorms()),
)
