"""Make tiny vocabularies as GGUF metadata, and tokenize by SentencePiece's rule, to compare tokenizers with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs; they're friends.",
    "It's 12345 o'clock, and we've 007 apples at 3.14 each!  Two  spaces,\n\nnew lines,\ttabs.",
    "Grüße aus Köln, schöne Grüße. こんにちは世界。 Привет мир, привет всем.",
] * 3
SAMPLES = [
    "The quick brown fox", " leading", "trailing ", "a  b   c", "\n\nx\n", "It's we've THEY'RE", "12345 007 3.14",
    "Grüße, schöne 世界", "Привет 🦙 unknown ☃", "tab\there", "", "don't!?... (ok)", "<s>not control</s>", "x\r\ny",
]  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
"""A chat template that writes every message on a line of its own."""


def write(directory: Path, keys: dict[str, Any]) -> Path:
    """Write a directory whose metadata.gguf has these keys, below `tokenizer.` but for `llama.*`, `general.*`."""
    directory.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(directory / "metadata.gguf", "llama")
    for key, value in keys.items():
        full = key if key.startswith(("llama.", "general.")) else f"tokenizer.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return directory


def sentencepiece() -> dict[str, Any]:
    """Return the keys of a vocabulary like SentencePiece's BPE: specials, bytes, then pieces, best first."""
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=220, show_progress=False)
    trained.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in learned if len(piece) > 1] + [piece for piece, _ in learned if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_end|>", "  ", *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, CONTROL, USER_DEFINED, *[NORMAL] * len(pieces)]
    scores = [*[0.0] * 261, *(-float(i) for i in range(len(pieces)))]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


def sentencepiece_ids(keys: dict[str, Any], text: str) -> list[int]:
    """Return ids by the rule itself: repeatedly join the neighbours that make the best-scored token."""
    tokens, types = keys["ggml.tokens"], keys["ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    found, rest = list[int](), text
    while rest:
        # The text is split at the first user-defined token.
        at, token = min(((rest.find(token), token) for token in own if token in rest), default=(len(rest), ""))
        if part := rest[:at]:
            prefix = " " if keys.get("ggml.add_space_prefix", True) else ""
            symbols = list((prefix + part).replace(" ", "▁"))
            while True:
                joined = [
                    (-keys["ggml.scores"][ids[a + b]], i)
                    for i, (a, b) in enumerate(pairwise(symbols))
                    if a + b in ids and types[ids[a + b]] == NORMAL
                ]
                if not joined:
                    break
                i = min(joined)[1]
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            for symbol in symbols:
                fallback = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
                found += [ids[symbol]] if symbol in ids else fallback
        found += [ids[token]] if token else []
        rest = rest[at + len(token) :]
    return found


def byte_level(splits: list[str], *, whole_words: bool = False, digits: bool = False) -> Tokenizer:
    """Train a byte-level tokenizer that splits by these expressions."""
    trained = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    if digits:
        steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits))
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    trained.train_from_iterator(CORPUS, trainer)
    return trained


def byte_level_keys(trained: Tokenizer, pre: str) -> dict[str, Any]:
    """Return the GGUF keys of the tokenizer, with two control tokens and a user-defined one at the end."""
    import json

    model = json.loads(trained.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    count = len(tokens)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [*tokens, "<|endoftext|>", "<|im_end|>", "<think>"],
        "ggml.token_type": [*[NORMAL] * count, CONTROL, CONTROL, USER_DEFINED],
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": count,
        "ggml.eos_token_id": count + 1,
    }
