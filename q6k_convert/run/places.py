"""Places that a command line names for what is written: - is standard output, where a command can write to it."""

from __future__ import annotations

from pathlib import Path

STDIN = STDOUT = Path("-")
"""What - stands for: standard input where something is read, standard output where it is written."""


def named(path: Path, stream: str = "standard output") -> str:
    """Return the name of a place for people, where - is a stream."""
    return stream if path == STDOUT else str(path)


def output(name: str, *, stdout: bool = False) -> Path:
    """Return the path of a file or directory to write.

    Args:
        name: its name, as it was typed.
        stdout: whether - is standard output, `STDOUT`.

    Raises:
        ValueError: it is -, and this cannot be written to standard output.
    """
    if name == "-" and not stdout:
        raise ValueError("'-': this is not written to standard output; a file of that name is ./-.")
    path = Path(name)
    return path.absolute() if path == STDOUT and name != "-" else path
