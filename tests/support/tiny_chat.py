"""A tiny llama with a vocabulary and a chat template, as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import Tiny
from tokenizer_files import TEMPLATE, sentencepiece


def tiny_chat(directory: Path) -> tuple[Path, Any]:
    """Return the bundle, and transformers' model with its weights."""
    keys = {f"tokenizer.{key}": value for key, value in sentencepiece().items() if not key.endswith("_token_id")}
    keys |= {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.suppress_tokens": [5]}
    count = len(keys["tokenizer.ggml.tokens"])
    return Tiny("llama", "llama", {"vocab_size": count}, keys).bundle(directory)
