"""The table of GGML types against the `gguf` package's."""

from __future__ import annotations

import gguf

from q6k_kernels.formats.ggml import GROUP, REMOVED_TYPES, SUPER_BLOCK, TYPE_SIZES, GGMLType


def test_numbers_names_and_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {kind.name: (int(kind), gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (int(kind), TYPE_SIZES[kind]) for kind in GGMLType}
    assert ours == theirs


def test_removed_types_are_none_of_the_known() -> None:
    assert not set(REMOVED_TYPES) & set(map(int, GGMLType))


def test_the_sizes_of_q6_k_agree() -> None:
    assert TYPE_SIZES[GGMLType.Q6_K] == (
        SUPER_BLOCK,
        SUPER_BLOCK // 2 + SUPER_BLOCK // 4 + SUPER_BLOCK // GROUP + 2,
    )
