"""The error of tokenizers."""

from __future__ import annotations

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import ModelError

GIVE_A_DIRECTORY = "Give the model's own tokenizer: a directory with its tokenizer.json (--tokenizer DIR)."


class TokenizerError(ModelError):
    """No tokenizer can be made for this model, or it cannot do what is asked."""


def vocabulary_error(metadata: Metadata, key: str, problem: str) -> TokenizerError:
    """Return the error for a key `tokenizer.ggml.KEY` of a file."""
    return TokenizerError(f"{metadata.path}: tokenizer.ggml.{key}: {problem}", GIVE_A_DIRECTORY)
