"""Every name of a split: pieces of tricky texts, and what the name says besides, as llama.cpp has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from q6k_kernels.tokenizer.pieces import byte_level_token
from q6k_kernels.tokenizer.splits import SPLITS
from q6k_kernels.tokenizer.text_tokenizer import Tokenizer
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from tokenizer_files import NORMAL, write

GOLDEN = json.loads(Path(__file__).with_name("golden_splits.json").read_text(encoding="utf-8"))
WHOLE = "QZ"
"""A token that no merge makes."""


def loaded(directory: Path, name: str, **more: Any) -> Tokenizer:
    tokens = [*map(byte_level_token, map(chr, range(128))), WHOLE]
    keys = {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": tokens,
        "ggml.token_type": [NORMAL] * len(tokens),
        "ggml.merges": ["a b"],
    }
    return load_tokenizer(write(directory / "m", keys | {key.replace("__", "."): v for key, v in more.items()}))


def lengths(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the bytes of a text's pieces."""
    backend = tokenizer.vocabulary.backend
    if backend.normalizer is None:
        return [len(piece) for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    return [len(piece.replace("▁", " ").encode()) for piece, _ in pieces]


def test_all_names_are_known() -> None:
    assert set(GOLDEN["names"]) == set(SPLITS)


@pytest.mark.parametrize("name", GOLDEN["names"])
def test_a_name_means_what_it_means_in_llama_cpp(tmp_path: Path, name: str) -> None:
    rule, whole, add_bos, add_bos_denied, bos = GOLDEN["names"][name]
    tokenizer = loaded(tmp_path, name)
    for text, expected in zip(GOLDEN["texts"], GOLDEN["rules"][rule], strict=True):
        assert lengths(tokenizer, text) == expected, text
    assert len(tokenizer.vocabulary.encode(WHOLE)) == (1 if whole else 2)
    assert tokenizer.vocabulary.add_bos == add_bos
    assert tokenizer.vocabulary.names.get("bos", -1) == bos
    assert loaded(tmp_path, name, ggml__add_bos_token=False).vocabulary.add_bos == add_bos_denied
