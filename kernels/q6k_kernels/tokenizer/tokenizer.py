"""The tokenizer of a bundle, by the vocabulary in its `metadata.gguf` or by a Hugging Face directory.

tokenizer = load_tokenizer("out/")
ids = tokenizer.encode("The capital of France is")               BOS as the file says
ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])    by the file's chat template
text = tokenizer.decode(ids)
stream = tokenizer.stream()                                      text as tokens arrive, whole characters only
print(stream.push(token), end="") ... print(stream.end())
"""

from __future__ import annotations

import os

from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.bundle.published import directory_of
from q6k_kernels.tokenizer.directory import from_directory
from q6k_kernels.tokenizer.text_tokenizer import Tokenizer
from q6k_kernels.tokenizer.vocabulary import read_vocabulary


def load_tokenizer(bundle: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Load the tokenizer of a bundle.

    Args:
        bundle: its directory, its name on the Hugging Face Hub, or its `metadata.gguf`.
        directory: a Hugging Face directory whose tokenizer is used instead; nothing is downloaded, and no code in
            it is run.

    Raises:
        TokenizerError: the vocabulary is of an unknown kind, incomplete or contradictory, or no tokenizer loads
            from the directory.
        BundleError: `metadata.gguf` is broken.
        OSError: `metadata.gguf` cannot be read.
    """
    if directory is not None:
        return from_directory(directory)
    metadata = read_metadata(directory_of(bundle))
    return Tokenizer(read_vocabulary(metadata), metadata.string("tokenizer.chat_template"))
