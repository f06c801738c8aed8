"""The files that transformers wants beside a bundle's own: what the manifest says about them.

A bundle is whole without them, and is opened without a look at them: they say nothing that `metadata.gguf` does
not. Their checksum is SHA-256, which the Hugging Face Hub names, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from q6k_kernels.bundle.manifest import Companion, Manifest
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.structure import Finding, wrong_file


def companion(content: bytes) -> Companion:
    """Return the manifest's entry of a file."""
    return Companion(len(content), hashlib.sha256(content).hexdigest())


def check_companions(directory: Path, manifest: Manifest) -> Iterator[Finding]:
    """Check that every file is there as the manifest says: a regular file, not a link elsewhere, of its SHA-256.

    Raises:
        OSError: a file that is there cannot be read.
    """
    for name, expected in manifest.companions.items():
        path = directory / name
        if problem := wrong_file(path, expected.size):
            yield Finding(problem, name)
        elif (found := _sha256(path)) != expected.sha256:
            yield Finding(f"SHA-256 is {found}, expected {expected.sha256}", name)


def _sha256(path: Path) -> str:
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
