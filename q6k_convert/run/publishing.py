"""Write the files for transformers into a bundle, and list them in its manifest.

Each file appears whole, the manifest last. A run that is killed leaves files that the manifest does not list; the
next run writes the same ones. Files that no run of this command wrote are left alone: it writes nothing then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from q6k_convert.convert.locking import lock
from q6k_convert.errors import IOFailedError
from q6k_convert.run.running import Weights, check_packages
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.companions import check_companions, companion
from q6k_kernels.bundle.manifest import Manifest
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.writer import fsync_directory

_PARTIAL = ".{}.q6k-partial"


def run(directory: Path, weights: Weights, note: Callable[[str], None]) -> dict[str, Any]:
    """Write the files, and return the document for `--json`.

    Args:
        directory: the bundle.
        weights: form of weights where the model runs on a CPU.
        note: called with each line about the progress.

    Raises:
        EnvironmentMissingError: torch or transformers is missing.
        ModelError: no model or no tokenizer can be made from the bundle.
        BundleError: the directory is not a bundle.
        IOFailedError: one of the files is there and not this command's, or another run writes to the bundle.
        OSError: a file cannot be read or written.
    """
    manifests.read(directory)
    check_packages("writing files for transformers")
    from q6k_kernels.bundle.metadata import read_metadata
    from q6k_kernels.models.hub_files import hub_files

    held = lock(directory.resolve(), directory)
    try:
        manifest = manifests.read(directory)
        note(f"{directory}: making the files; a large vocabulary takes seconds")
        files = hub_files(read_metadata(directory), manifest, weights)
        _check_free(directory, manifest, files)
        written = [name for name, content in files.items() if _write(directory, name, content)]
        listed = {name: companion(files[name]) for name in sorted(files)}
        _write(directory, manifests.NAME, manifests.serialize(replace(manifest, companions=listed)))
        for name in set(manifest.companions) - set(files):
            (directory / name).unlink()
        fsync_directory(directory)
    finally:
        os.close(held)
    note(f"{directory}: {', '.join(sorted(files))}: {'written' if written else 'all there already'}")
    return {
        "status": "done",
        "bundle": str(directory),
        "written": sorted(written),
        "files": {name: vars(entry) for name, entry in listed.items()},
    }


def _check_free(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Check that every file is missing, or as this command writes it, now or when the manifest was written."""
    changed = {finding.file for finding in check_companions(directory, manifest)}
    ours = set(manifest.companions) - changed
    for name in {**files, **manifest.companions}:
        path = directory / name
        if (directory / manifests.NAME).is_symlink() or path.is_symlink():
            raise IOFailedError(
                f"{path}: the bundle is made of links, as in a cache, which is not written to",
                "Copy it to a directory of its own: `cp -rL`.",
            )
        if name in ours or not os.path.lexists(path):
            continue
        if name not in files or not path.is_file() or path.read_bytes() != files[name]:
            raise IOFailedError(f"{path} is there, and this command did not write it so", "Move it away.")


def _write(directory: Path, name: str, content: bytes) -> bool:
    """Write a file so that it appears whole; return False if it is there already."""
    path, partial = directory / name, directory / _PARTIAL.format(name)
    if path.is_file() and path.read_bytes() == content:
        return False
    try:
        with naming(partial), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return True
