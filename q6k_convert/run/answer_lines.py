"""A file of answers, a line for each line of a file of prompts, in their order.

While lines are missing the file is called NAME.part, and has them in the order in which they were done; so a file
called NAME is whole. Every line is written at once, with its number and a digest of its prompt and settings. A run
that was killed leaves whole lines and perhaps a torn last one, which the next run drops before it does what is
missing. A file that is whole, and to whose prompts lines were added since, becomes NAME.part again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from q6k_convert.convert.placing import rename_new
from q6k_convert.errors import IOFailedError
from q6k_kernels.bundle.parsing import parse
from q6k_kernels.bundle.writer import fsync_directory


class AnswerFile:
    """The file, open for writing, locked against other runs.

    Attributes:
        torn: bytes of a torn last line that was dropped.

    Args:
        path: its name once it is whole.
        digests: the digests of all lines.

    Raises:
        IOFailedError: the file is none, or of other prompts or settings, or another run is writing it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, digests: Sequence[str]) -> None:
        self._path, self._digests, self.torn = path, digests, 0
        if os.path.lexists(path) and not path.is_file():
            raise IOFailedError(f"{path}: expected a regular file", "Give another --out.")
        self._part = path.with_name(f"{path.name}.part")
        self._at = dict[int, tuple[int, int]]()  # number -> where its line begins and ends
        self._failed = set[int]()
        self._whole, partial = path.exists(), self._part.exists()
        if self._whole and partial:
            raise IOFailedError(f"{path} and {self._part.name} both exist", "Remove the one that is not wanted.")
        name = path if self._whole else self._part
        self._file: BinaryIO = name.open("r+b" if self._whole or partial else "x+b")
        try:
            self._lock()
            self._read(name)
            if self._whole and not self.complete:
                path.rename(self._part)
                self._whole = False
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, number: int) -> bool:
        return number in self._at

    def __len__(self) -> int:
        return len(self._at)

    @property
    def complete(self) -> bool:
        """Whether all lines are there."""
        return len(self._at) == len(self._digests)

    @property
    def failed(self) -> list[int]:
        """The numbers of lines whose answer is an error."""
        return sorted(self._failed)

    def put(self, number: int, answer: dict[str, Any]) -> None:
        """Write the answer of a line.

        Args:
            number: number of the line, from 1 on.
            answer: the object; a line with `error` has failed.
        """
        row = {"line": number, **answer, "request": self._digests[number - 1]}
        begin = self._file.tell()
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._note(row, begin, self._file.tell())

    def close(self) -> None:
        """Close the file; if all lines are there, put them in order and give it its name.

        Raises:
            IOFailedError: something has that name by now.
            OSError: it cannot be written.
        """
        with self._file:
            if self._whole or not self.complete:
                return
            ordered = [self._at[number] for number in range(1, len(self._digests) + 1)]
            if ordered != sorted(ordered):
                self._put_in_order(ordered)
            os.fsync(self._file.fileno())
            try:
                rename_new(self._part, self._path)
            except FileExistsError as error:
                raise IOFailedError(
                    f"{self._path} appeared while it was made; all answers are in {self._part.name}",
                    "Move it away and run the same command again, or rename the answers.",
                ) from error
            fsync_directory(self._path.parent)

    def _put_in_order(self, ordered: list[tuple[int, int]]) -> None:
        name = self._path.with_name(f"{self._path.name}.ordered")
        with name.open("wb") as file:
            for begin, end in ordered:
                self._file.seek(begin)
                file.write(self._file.read(end - begin))
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(self._part, name)
        name.rename(self._part)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IOFailedError(
                f"{self._path}: another run is writing it", "Wait until it ends, or give another --out."
            ) from error

    def _read(self, name: Path) -> None:
        """Find the lines that are there, check them, and drop a torn one."""
        end = 0
        for at, row in enumerate(self._file, 1):
            if not row.endswith(b"\n"):
                self.torn = len(row)
                break
            try:
                content = parse(row)
            except ValueError:
                content = None
            number = content.get("line") if isinstance(content, dict) else None
            if not self._is_missing(number) or content.get("request") != self._digests[number - 1]:
                raise IOFailedError(
                    f"{name}: line {at} is no answer of this model to one of these prompts, with these settings",
                    "Give another --out, or remove it.",
                )
            self._note(content, end, end + len(row))
            end += len(row)
        self._file.seek(end)
        self._file.truncate()

    def _is_missing(self, number: Any) -> TypeGuard[int]:
        """Check whether a number is that of a line that is not there."""
        return isinstance(number, int) and 1 <= number <= len(self._digests) and number not in self._at

    def _note(self, row: dict[str, Any], begin: int, end: int) -> None:
        self._at[row["line"]] = begin, end
        if "error" in row:
            self._failed.add(row["line"])
