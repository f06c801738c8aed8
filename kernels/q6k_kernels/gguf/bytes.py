"""The bytes of an untrusted file: positioned reads, a cursor that bounds every length, and errors about the file.

Files are read with `pread` and never mapped: one that shrinks meanwhile raises an error and crashes nothing. A file
that is closed is opened for the time of each read: a split model may have more parts than a process may hold open.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from q6k_kernels.errors import GgufReadError, GgufRejectedError

_WINDOW = 1 << 18
_A_LIMIT = (
    'The file may be sound: this is a limit of q6k-convert ("Limits on input" in kernels/FORMAT.md). '
    "Report the model if it needs more."
)
_NUMBERS = {form: struct.Struct("<" + form) for form in "BIQ"}


class SourceBytes:
    """A regular file opened for reading.

    Raises:
        GgufReadError: it is no regular file, or cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd, self.stat = self._opened()
        self.size = self.stat.st_size

    def _opened(self) -> tuple[int, os.stat_result]:
        try:
            # Opening may have an effect on what is no regular file, so look first; that may change meanwhile.
            found = self.path.stat()
            if stat.S_ISREG(found.st_mode):
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                if stat.S_ISREG((found := os.fstat(fd)).st_mode):
                    return fd, found
                os.close(fd)
        except OSError as error:
            raise GgufReadError(f"{self.path}: {error.strerror}", "Check the path and its permissions.") from error
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise GgufReadError(f"{self.path} is {kind}", "Give the path of a .gguf file.")

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Give the descriptor, opened for the time of the block if the file is closed."""
        if self._fd >= 0:
            yield self._fd
            return
        fd, now = self._opened()
        try:
            self._check_same(now)
            yield fd
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from the file at `offset`. Several threads may call it at once.

        Raises:
            GgufReadError: the file has become shorter, or the read failed.
        """
        done = 0
        with self._descriptor() as fd:
            while done < len(buffer):
                try:
                    count = os.preadv(fd, [buffer[done:]], offset + done)
                except OSError as error:
                    raise GgufReadError(
                        f"{self.path}: reading at byte {offset + done}: {error.strerror}", "Check the disk."
                    ) from error
                if count == 0:
                    raise GgufReadError(
                        f"{self.path}: ends at byte {offset + done}, but had {self.size} bytes when it was opened",
                        "Something is rewriting the file: wait until it is whole and run again.",
                    )
                done += count

    def read(self, offset: int, length: int) -> bytearray:
        """Return `length` bytes at `offset`; the caller has bounded `length`."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return data

    def check_unchanged(self) -> None:
        """Raise GgufReadError if the file was modified since it was opened."""
        with self._descriptor() as fd:
            self._check_same(os.fstat(fd))

    def _check_same(self, now: os.stat_result) -> None:
        if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
            raise GgufReadError(
                f"{self.path} was modified while it was being read ({self.stat.st_size} bytes before, "
                f"{now.st_size} now)",
                "Run again once nothing writes to it.",
            )

    def decoded(self, raw: bytes, item: str, offset: int, errors: str = "strict") -> str:
        """Decode UTF-8 text; raise GgufRejectedError if it is none and `errors` (see `bytes.decode`) is strict."""
        try:
            return raw.decode(errors=errors)
        except UnicodeDecodeError as error:
            raise self.reject(item, f"invalid UTF-8 ({error.reason})", offset + error.start) from error

    def beyond(self, item: str, found: str, limit: int, offset: int | None) -> GgufRejectedError:
        """Return an error about what this program limits, and the format does not."""
        return self.reject(item, f"{found}, more than the limit of {limit}", offset, remedy=_A_LIMIT)

    def reject(self, item: str, problem: str, offset: int | None, **more: str) -> GgufRejectedError:
        """Return an error about this file."""
        return GgufRejectedError(self.path, item, problem, offset=offset, **more)


class Cursor:
    """A position in a file that advances through a window of at most `_WINDOW` bytes (more for one long string).

    Args:
        file: the file.
        at: where to begin.
        end: where to end; by default at the end of the file.
    """

    def __init__(self, file: SourceBytes, at: int = 0, end: int | None = None) -> None:
        self.file = file
        self.at = at
        self.end = file.size if end is None else end
        self._window = b""
        self._window_at = 0

    @property
    def remaining(self) -> int:
        """Number of bytes from here to the end."""
        return self.end - self.at

    def take(self, length: int, item: str) -> bytes:
        """Return the next `length` bytes; the caller has bounded `length`."""
        if length > self.remaining:
            raise self.file.reject(
                item, f"{length} bytes expected, but the file ends after {max(self.remaining, 0)}", self.at
            )
        first = self.at - self._window_at
        if first < 0 or first + length > len(self._window):
            self._window_at = self.at
            self._window = bytes(self.file.read(self.at, min(max(length, _WINDOW), self.remaining)))
            first = 0
        self.at += length
        return self._window[first : first + length]

    def number(self, form: str, item: str) -> int:
        """Return the next little-endian integer; `form` is the struct letter."""
        packed = _NUMBERS[form]
        value: int = packed.unpack(self.take(packed.size, item))[0]
        return value

    def _string_length(self, item: str, bound: int) -> int:
        at = self.at
        length = self.number("Q", item)
        if length > self.remaining:
            raise self.file.reject(item, f"string of {length} bytes, but the file ends after {self.remaining}", at)
        if length > bound:
            raise self.file.beyond(item, f"string of {length} bytes", bound, at)
        return length

    def string(self, item: str, bound: int, errors: str = "strict") -> str:
        """Return the next string, of at most `bound` bytes; `errors` as for `SourceBytes.decoded`."""
        length = self._string_length(item, bound)
        at = self.at
        return self.file.decoded(self.take(length, item), item, at, errors)

    def skip_string(self, item: str, bound: int) -> None:
        """Step over the next string, of at most `bound` bytes; it may be no text."""
        self.skip(self._string_length(item, bound), item)

    def strings(self, count: int, item: str, bound: int, errors: str = "strict") -> list[str]:
        """Return the next `count` strings, each of at most `bound` bytes; a tight loop, as in `skip_strings`."""
        unpack, found = struct.Struct("<Q").unpack_from, list[str]()
        while len(found) < count:
            # This one fills the window, or reports what is wrong.
            found.append(self.string(item, bound, errors))
            window, at = self._window, self.at - self._window_at
            length = len(window)
            if length > bound:  # else no string in the window can be too long
                continue
            try:
                for _ in range(count - len(found)):
                    end = at + 8 + unpack(window, at)[0]
                    if end > length:
                        break
                    found.append(window[at + 8 : end].decode())
                    at = end
            except (struct.error, UnicodeDecodeError):
                pass  # the window ends before this string, or `string` will say where it is broken
            self.at = self._window_at + at
        return found

    def skip(self, length: int, item: str) -> None:
        """Step over `length` bytes, which must be there."""
        if length > self.remaining:
            raise self.file.reject(
                item, f"{length} bytes expected, but the file ends after {self.remaining}", self.at
            )
        self.at += length

    def skip_strings(self, count: int, item: str) -> None:
        """Step over `count` strings; a vocabulary has hundreds of thousands, hence the tight loop."""
        unpack, done = struct.Struct("<Q").unpack_from, 0
        while done < count:
            self.take(8, f"{item}[{done}]")  # fills the window from here on, or reports the end
            window, at = self._window, self.at - 8 - self._window_at
            begin = at
            try:
                for done in range(done + 1, count + 1):  # noqa: B007, B020 -- resumes where it stopped
                    length = unpack(window, at)[0]
                    begin, at = at, at + 8 + length
            except (struct.error, OverflowError):  # the window ends before this string
                done -= 1
            self.at = self._window_at + at
            if self.at > self.file.size:
                raise self.file.reject(
                    f"{item}[{done - 1}]",
                    f"string reaches byte {self.at}, past the end of the file ({self.file.size})",
                    self._window_at + begin,
                )
