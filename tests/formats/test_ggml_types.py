"""The table of GGML types against the `gguf` package's."""

from __future__ import annotations

import gguf

from q6k_kernels.formats.ggml import REMOVED_TYPES, TYPE_SIZES, GGMLType, UnknownType, super_blocks, type_of

NEWER = {"Q2_0": (42, (64, 18))}
"""Types of llama.cpp that the installed `gguf` package may be too old to know."""


def test_numbers_names_and_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {kind.name: (int(kind), gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (int(kind), TYPE_SIZES[kind]) for kind in GGMLType}
    assert ours == NEWER | theirs


def test_removed_types_are_none_of_the_known() -> None:
    assert not set(REMOVED_TYPES) & set(map(int, GGMLType))


def test_a_number_gives_its_type_or_one_that_is_unknown() -> None:
    assert [type_of(int(kind)) for kind in GGMLType] == list(GGMLType)
    newer, removed = type_of(77), type_of(4)
    assert (newer, removed) == (UnknownType(77), UnknownType(4))
    assert (newer.name, removed.name) == ("type 77", "Q4_2")


def test_a_row_has_whole_super_blocks() -> None:
    assert [super_blocks(k) for k in (32, 256, 288, 576, 5376)] == [1, 1, 2, 3, 21]
