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

_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "pad": "padding",
    "fim_pre": "fim_pre",
    "fim_suf": "fim_suf",
    "fim_mid": "fim_mid",
    "fim_pad": "fim_pad",
    "fim_rep": "fim_rep",
    "fim_sep": "fim_sep",
}
"""Name of a special token -> its name in a key."""
_OLD_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
"""Keys of older files, which count more where both stand."""

END_TEXTS = frozenset({
    "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
"""Tokens that end an answer by their text."""
_NOT_BESIDE = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|return|>", "<|calls|>"}, "<|end|>"),
    ({"<|flush|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|calls|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
    ({"<|plamo:eos|>"}, "</s>"),
)
"""Where a vocabulary has the first, the second is no end: it separates parts of an answer, or means nothing."""
_INFILL = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
"""Tokens of code models around a gap; where a file names none, the first of these texts that a vocabulary has."""
_INFILL_ENDS = ("fim_pad", "fim_rep", "fim_sep")
"""Those that separate files, and so end an answer."""
_PARTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
"""Tokens between the parts of an answer."""
_KEEP_BLANKS = ("<unk>", "<s>", "<|endoftext|>")
_SWALLOW_BLANKS = ("</s>",)


def special_ids(
    metadata: Metadata, defaults: Mapping[str, int], count: int, *, default_bos: bool = True
) -> tuple[dict[str, int], list[str]]:
    """Return the ids of special tokens by name, and notes about what llama.cpp's defaults replace.

    Args:
        metadata: the keys `tokenizer.ggml.NAME_token_id`.
        defaults: ids by name where the file names none.
        count: number of tokens.
        default_bos: whether the default of BOS counts.
    """
    names, notes = dict[str, int](), list[str]()
    for name, word in _KEYS.items():
        key = token_id_key(word)
        found = metadata.integer(key)
        default = defaults.get(name) if name != "bos" or default_bos else None
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
    for name, word in _OLD_KEYS.items():
        found = metadata.integer(token_id_key(word))
        if found is not None and 0 <= found < count:
            names[name] = found
    return names, notes


def end_texts(texts: Collection[str]) -> frozenset[str]:
    """Return those texts of a vocabulary that end an answer wherever they stand."""
    found = {text for text in END_TEXTS if text in texts}
    return frozenset(found - {text for beside, text in _NOT_BESIDE if beside <= found})


def control_texts(names: Mapping[str, int], ids: Mapping[str, int]) -> frozenset[str]:
    """Return the texts of tokens that are control tokens whatever type the file gives them.

    Args:
        names: ids of special tokens by name.
        ids: ids of all tokens by text.
    """
    return end_texts(ids.keys()) | set(_infill_texts(names, ids).values())


def stop_ids(names: Mapping[str, int], ids: Mapping[str, int]) -> frozenset[int]:
    """Return the ids that end an answer.

    Args:
        names: ids of special tokens by name.
        ids: ids of all tokens by text.
    """
    stop = {ids[text] for text in end_texts(ids.keys())}
    stop |= {names[name] for name in (*ENDS, *_INFILL_ENDS) if name in names}
    stop |= {ids[text] for name, text in _infill_texts(names, ids).items() if name in _INFILL_ENDS}
    return frozenset(stop - _no_ends(ids))


def shown(ids: Mapping[str, int]) -> frozenset[int]:
    """Return the ids of control tokens that an answer shows: without these between its parts it cannot be read.

    Args:
        ids: ids of all tokens by text.
    """
    return frozenset({ids[text] for text in _PARTS if text in ids} | _no_ends(ids))


def _infill_texts(names: Mapping[str, int], ids: Mapping[str, int]) -> dict[str, str]:
    found = {name: next((text for text in texts if text in ids), None) for name, texts in _INFILL.items()}
    return {name: text for name, text in found.items() if text is not None and name not in names}


def _no_ends(ids: Mapping[str, int]) -> set[int]:
    return {ids[text] for beside, text in _NOT_BESIDE if text in ids and all(each in ids for each in beside)}


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
