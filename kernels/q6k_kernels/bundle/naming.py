"""Names of a bundle's files, and a file's name in the errors of reading and writing it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = re.compile(
    r"bundle\.json|metadata\.gguf|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def is_bundle_file(name: str) -> bool:
    """Check whether a conversion writes files of this name into a bundle."""
    return _NAMES.fullmatch(name) is not None


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError that has none, as those of open files do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise
