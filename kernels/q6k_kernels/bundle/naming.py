"""Names of a bundle's files, and a file's name in the errors of reading and writing it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = re.compile(
    r"bundle\.json|metadata\.gguf|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


COMPANIONS = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Names of the files for transformers that may lie in a bundle, see `companions`."""


def is_bundle_file(name: str) -> bool:
    """Check whether a conversion writes files of this name into a bundle."""
    return _NAMES.fullmatch(name) is not None


def may_be_in_bundle(name: str) -> bool:
    """Check whether files of this name are written into a bundle, by a conversion or later."""
    return is_bundle_file(name) or name in COMPANIONS


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError that has none, as those of open files do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise
