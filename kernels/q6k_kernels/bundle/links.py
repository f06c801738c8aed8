"""Where the files of a bundle may lie: in its directory, and nowhere that a link in it may lead to."""

from __future__ import annotations

import os
from pathlib import Path


def outside(path: Path) -> str | None:
    """Return what is wrong with a file of a bundle that is a link out of its directory; None if it is not."""
    # Not `Path.resolve`, which raises errors of its own at links that go in a circle.
    real, home = os.path.realpath(path), os.path.realpath(path.parent)
    return None if os.path.dirname(real) == home else f"is a link out of the directory, to {real}"  # noqa: PTH120
