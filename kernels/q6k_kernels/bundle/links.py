"""Where the files of a bundle may lie: in its directory, or where the cache of the Hugging Face Hub keeps them.

That cache has a directory for every commit, of links to files that are named by their hashes:

    models--ORG--REPO/snapshots/COMMIT/bundle.json    a link to
    models--ORG--REPO/blobs/HASH                      the content
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def outside(path: Path) -> str | None:
    """Return what is wrong with a file of a bundle that is a link out of its directory; None if nothing is."""
    # Not `Path.resolve`, which raises errors of its own at links that go in a circle.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    if real.parent == home or (real.parent == _blobs(home) and _HASH.fullmatch(real.name)):
        return None
    return f"is a link out of the directory, to {real}"


def _blobs(home: Path) -> Path | None:
    """Return the directory of contents that belongs to a directory of the Hub's cache; None of any other."""
    for commit in (home, *home.parents):
        repository = commit.parent.parent
        if commit.parent.name == "snapshots" and _COMMIT.fullmatch(commit.name):
            return repository / "blobs" if repository.name.startswith("models--") else None
    return None
