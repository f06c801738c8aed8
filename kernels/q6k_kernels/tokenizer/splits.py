"""The rules of byte-level vocabularies that split a text before merging, by `tokenizer.ggml.pre`."""

from __future__ import annotations

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
# llama.cpp's fallback for files that name no rule it knows: these splits, one after the other.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3,)),
    "smaug-bpe": (_LLAMA3,),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "stablelm2": (_QWEN2,),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    "smollm": (r"\p{N}", _GPT2),
    "default": _DEFAULT,
}
"""`tokenizer.ggml.pre` -> expressions that split text; each splits the pieces of the one before."""
WHOLE_WORDS_AND_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3")
"""Rules whose vocabularies take whole words before merging, and begin every text with BOS."""
