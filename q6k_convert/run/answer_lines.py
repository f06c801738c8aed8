"""Answers, a line for each line of a file of prompts, in their order: in a file, or on standard output.

While lines are missing the file is called NAME.part, and has them in the order in which they were done; so a file
called NAME is whole. Every line is written at once, with its number and a digest of its prompt and settings. A run
that was killed leaves whole lines and perhaps a torn last one, which the next run drops before it does what is
missing. Lines that failed are missing, too: a later one with an answer takes the place of one with an error. So a
file that is whole becomes NAME.part again if lines have failed, or were added to the prompts since.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from q6k_convert.convert.placing import rename_new
from q6k_convert.errors import IOFailedError
from q6k_convert.run.places import STDOUT
from q6k_kernels.bundle.parsing import parse
from q6k_kernels.bundle.writer import fsync_directory


class Answers(ABC):
    """Where answers go.

    Attributes:
        torn: bytes of a torn last line that was dropped.
        retried: how many lines have failed before, and are missing for that.

    Args:
        digests: the digests of all lines.
    """

    def __init__(self, digests: Sequence[str]) -> None:
        self._digests, self._failed, self.torn, self.retried = digests, set[int](), 0, 0

    @abstractmethod
    def __contains__(self, number: int) -> bool:
        """Check whether the answer of a line is there."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of answers that are there."""

    @property
    def complete(self) -> bool:
        """Whether all lines are there."""
        return len(self) == len(self._digests)

    @property
    def failed(self) -> list[int]:
        """The numbers of lines whose answer is an error."""
        return sorted(self._failed)

    @abstractmethod
    def put(self, number: int, answer: dict[str, Any]) -> None:
        """Write the answer of a line.

        Args:
            number: number of the line, from 1 on.
            answer: the object; a line with `error` has failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End the output."""

    def _row(self, number: int, answer: dict[str, Any]) -> dict[str, Any]:
        return {"line": number, **answer, "request": self._digests[number - 1]}


class AnswerStream(Answers):
    """Standard output: an answer is written as soon as all before it are.

    Args:
        digests: the digests of all lines.
        show: called with each line.
    """

    def __init__(self, digests: Sequence[str], show: Callable[[str], None]) -> None:
        super().__init__(digests)
        self._show, self._waiting, self._shown = show, dict[int, str](), 0

    def __contains__(self, number: int) -> bool:
        return number <= self._shown or number in self._waiting

    def __len__(self) -> int:
        return self._shown + len(self._waiting)

    def put(self, number: int, answer: dict[str, Any]) -> None:  # noqa: D102
        self._waiting[number] = json.dumps(self._row(number, answer))
        if "error" in answer:
            self._failed.add(number)
        while (following := self._shown + 1) in self._waiting:
            self._show(self._waiting.pop(following))
            self._shown = following

    def close(self) -> None:
        """Do nothing: an answer that waits for one before it is lost."""


class AnswerFile(Answers):
    """The file, open for writing, locked against other runs.

    Attributes:
        torn: bytes of a torn last line that was dropped.

    Args:
        path: its name once it is whole, or a link to it.
        digests: the digests of all lines.

    Raises:
        IOFailedError: the file is none, or of other prompts or settings, or another run is writing it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, digests: Sequence[str]) -> None:
        super().__init__(digests)
        wrong = IOFailedError(f"{path}: expected a regular file", "Give another --out; - is standard output.")
        if path.exists() and not path.is_file():
            raise wrong
        # A link stays one: else /dev/stdout, if it is a file, would become one for everybody.
        linked = path.is_symlink()
        self._path = path = Path(os.path.realpath(path)) if linked else path
        self._part = path.with_name(f"{path.name}.part")
        if linked and not path.exists() and not self._part.exists():
            raise wrong
        self._at = dict[int, tuple[int, int]]()  # number -> where its line begins and ends
        self._whole, partial = path.exists(), self._part.exists()
        if self._whole and partial:
            raise IOFailedError(f"{path} and {self._part.name} both exist", "Remove the one that is not wanted.")
        name = path if self._whole else self._part
        self._file: BinaryIO = name.open("r+b" if self._whole or partial else "x+b")
        try:
            self._lock()
            self._read(name)
            self._forget_failed()
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

    def put(self, number: int, answer: dict[str, Any]) -> None:  # noqa: D102
        row = self._row(number, answer)
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
            nothing_else = sum(end - begin for begin, end in ordered) == self._file.tell()
            if ordered != sorted(ordered) or not nothing_else:
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

    def _forget_failed(self) -> None:
        """Make lines that have failed missing ones."""
        self.retried = len(self._failed)
        for number in self._failed:
            del self._at[number]
        self._failed.clear()

    def _is_missing(self, number: Any) -> TypeGuard[int]:
        """Check whether a number is that of a line that is not there, or has failed."""
        known = isinstance(number, int) and 1 <= number <= len(self._digests)
        return known and (number not in self._at or number in self._failed)

    def _note(self, row: dict[str, Any], begin: int, end: int) -> None:
        number = row["line"]
        self._at[number] = begin, end
        if "error" in row:
            self._failed.add(number)
        else:
            self._failed.discard(number)


def answers_to(path: Path, digests: Sequence[str], show: Callable[[str], None]) -> Answers:
    """Return where answers go, a file or `STDOUT`; arguments and errors as of both classes."""
    return AnswerStream(digests, show) if path == STDOUT else AnswerFile(path, digests)
