"""The kinds of vocabularies in GGUF files, `tokenizer.ggml.model`: those that are read, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from q6k_kernels.tokenizer.splits import SENTENCEPIECE, SPLITS, Split


@dataclass(frozen=True)
class Kind:
    """What a kind of vocabularies says about a file.

    Attributes:
        merges: whether tokens are made by a list of merges; else the best score joins first (SentencePiece's BPE).
        split: how texts are split, whatever `tokenizer.ggml.pre` says; None where that key names it.
        defaults: ids of special tokens, by name, that llama.cpp takes where the file names none.
    """

    merges: bool
    split: Split | None = None
    defaults: Mapping[str, int] = field(default_factory=dict)


KINDS: Mapping[str, Kind] = {
    "llama": Kind(merges=False, split=SENTENCEPIECE, defaults={"bos": 1, "eos": 2, "unk": 0}),
    "gpt2": Kind(merges=True, defaults={"bos": 11, "eos": 11}),
    "gemma4": Kind(merges=True, split=SPLITS["gemma4"]),
}
"""`tokenizer.ggml.model` -> its kind."""

UNSUPPORTED: Mapping[str, str] = {
    "bert": "WordPiece, of models that embed texts and write none",
    "t5": "SentencePiece's unigrams, of encoders and translators with an encoder",
    "rwkv": "a trie of whole words, of RWKV models, which do not run here",
    "plamo2": "unigrams that are read backwards, of PLaMo 2 models, which do not run here",
    "hybriddna": "runs of nucleotides, of models of DNA, which do not run here",
    "whitespace": "words between spaces, of models that embed texts and write none",
    "no_vocab": "the file was made without a vocabulary",
    "none": "the file was made without a vocabulary",
}
"""`tokenizer.ggml.model` -> what it is, and why it is not read."""
