"""The exported model that tests share; `conftest.exported` makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPRESSED = [13, 71]
"""Tokens that the model must not choose, and would."""


@dataclass(frozen=True)
class ExportedModel:
    """A tiny model with a window in one layer and none in the other, exported on the CPU.

    Attributes:
        bundle: bundle that it was made from.
        package: file that was exported.
        report: document that the command printed.
        traced: its two programs, as torch.export traced them.
    """

    bundle: Path
    package: Path
    report: dict[str, Any]
    traced: dict[str, Any]

    def changed(self, path: Path, change: Callable[[bytes], bytes], ending: str = "q6k_program") -> None:
        """Write the package again with another description, or with other entries whose names end so."""
        from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter

        with PT2ArchiveReader(str(self.package)) as old, PT2ArchiveWriter(str(path)) as new:
            for name in old.get_file_names():
                if name.startswith((".data", "byteorder", "archive_", "version")):
                    continue  # the writer's own
                content = old.read_bytes(name)
                if name.endswith(ending):
                    assert change(content) != content
                    content = change(content)
                new.write_bytes(name, content)
