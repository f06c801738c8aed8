"""Messages of a chat: typed at a terminal, or the lines of a pipe or file."""

from __future__ import annotations

import sys

from q6k_convert.errors import UsageError

MAX_LINE_BYTES = 1 << 24
_PROMPT, _MORE = "> ", ". "


class TypedMessages:
    """Messages on stdin, one a line; a line that ends in a backslash goes on in the next.

    Attributes:
        interactive: whether stdin is a terminal.

    Args:
        quiet: whether to show no prompt.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._quiet = quiet
        if self.interactive and sys.stdout.isatty():
            import readline  # noqa: F401 -- lets `input` edit lines and recall earlier ones

    def read(self) -> str | None:
        """Return the next message; None at the end.

        Raises:
            UsageError: a line is not UTF-8, or too long.
        """
        lines = list[str]()
        while (line := self._line(_MORE if lines else _PROMPT)) is not None:
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
        return "\n".join(lines) if lines else None

    def _line(self, prompt: str) -> str | None:
        if sys.stdin is None:
            return None
        return self._typed(prompt) if self.interactive else _piped()

    def _typed(self, prompt: str) -> str | None:
        try:
            if sys.stdout.isatty() and not self._quiet:
                line = input(prompt)
            else:
                # The prompt of `input` would go where the answers go.
                if not self._quiet:
                    sys.stderr.write(prompt)
                    sys.stderr.flush()
                line = input()
        except EOFError:
            sys.stderr.write("" if self._quiet else "\n")
            return None
        except UnicodeDecodeError as error:
            raise _not_utf_8(error.reason) from error
        try:
            line.encode()
        except UnicodeEncodeError as error:  # bytes that are not UTF-8, in a locale that lets them pass
            raise _not_utf_8(f"at character {error.start}") from error
        return line


def _piped() -> str | None:
    raw = sys.stdin.buffer.readline(MAX_LINE_BYTES + 1)
    if not raw:
        return None
    if len(raw) > MAX_LINE_BYTES:
        raise UsageError(f"a line on stdin is longer than {MAX_LINE_BYTES} bytes", "Give shorter lines.")
    try:
        return raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _not_utf_8(f"{error.reason} at byte {error.start}") from error


def _not_utf_8(why: str) -> UsageError:
    return UsageError(f"a line on stdin is not UTF-8: {why}", "Write it in UTF-8.")
