"""Tokens with a meaning: where a text begins, and where an answer ends.

GGUF files are made for llama.cpp, so what llama.cpp reads into a vocabulary is read here, too: its ids where the
file names none or one that no token has, and ends of answers by their text, whatever type the file gives them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from q6k_kernels.bundle.metadata import ENDS, Metadata, token_id_key

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, `tokenizer.ggml.token_type`."""
NEVER_TEXT = (CONTROL, UNKNOWN)
"""Types of tokens that no text becomes."""

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "gpt2": {"bos": 11, "eos": 11},
}
"""`tokenizer.ggml.model` -> the ids that llama.cpp takes where the file names none."""
_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "pad": "padding",
    "fim_pad": "fim_pad",
    "fim_rep": "fim_rep",
    "fim_sep": "fim_sep",
}

END_TEXTS = frozenset({
    "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
})  # fmt: skip
"""Tokens that end an answer by their text."""
_NOT_BESIDE = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|return|>", "<|calls|>"}, "<|end|>"),
    ({"<|flush|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|calls|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
"""Where a vocabulary has the first, the second is no end: it separates parts of an answer, or means nothing."""
_INFILL = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Tokens of code models that separate files; the first that a vocabulary has ends an answer."""
_KEEP_BLANKS = ("<unk>", "<s>", "<|endoftext|>")
_SWALLOW_BLANKS = ("</s>",)


def special_ids(metadata: Metadata, kind: str, count: int) -> tuple[dict[str, int], list[str]]:
    """Return the ids of special tokens by name, and notes about what llama.cpp's defaults replace.

    Args:
        metadata: the keys `tokenizer.ggml.NAME_token_id`.
        kind: `tokenizer.ggml.model`.
        count: number of tokens.
    """
    names, notes = dict[str, int](), list[str]()
    for name, word in _KEYS.items():
        key = token_id_key(word)
        found, default = metadata.integer(key), DEFAULTS[kind].get(name)
        if found is not None and 0 <= found < count:
            names[name] = found
            continue
        taken = default is not None and default < count
        if default is not None and taken:
            names[name] = default
        if found is not None or (taken and name != "unk"):
            state = "missing" if found is None else f"{found}, and there are {count} tokens"
            what = f"{default} is taken, as by llama.cpp" if taken else "it is ignored, as by llama.cpp"
            notes.append(f"{key} is {state}: {what}")
    return names, notes


def end_texts(texts: Collection[str]) -> frozenset[str]:
    """Return those texts of a vocabulary that end an answer wherever they stand."""
    found = {text for text in END_TEXTS if text in texts}
    return frozenset(found - {text for beside, text in _NOT_BESIDE if beside <= found})


def stop_ids(names: Mapping[str, int], ids: Mapping[str, int]) -> frozenset[int]:
    """Return the ids that end an answer.

    Args:
        names: ids of special tokens by name.
        ids: ids of all tokens by text.
    """
    stop = {ids[text] for text in end_texts(ids.keys())} | {names[name] for name in ENDS if name in names}
    for name, texts in _INFILL.items():
        by_text = next((ids[text] for text in texts if text in ids), None)
        if (token := names.get(name, by_text)) is not None:
            stop.add(token)
    no_ends = {ids[text] for beside, text in _NOT_BESIDE if text in ids and all(each in ids for each in beside)}
    return frozenset(stop - no_ends)


def swallowing(metadata: Metadata, tokens: Collection[str], types: Collection[int]) -> frozenset[int]:
    """Return the special tokens that swallow the blanks behind them: those of Phi-3, told by the model's name."""
    name = (metadata.string("general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = (*NEVER_TEXT, USER_DEFINED)
    return frozenset(
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token not in _KEEP_BLANKS and (kind in special or token in _SWALLOW_BLANKS)
    )
