"""The closed set of failures a command can end in, each with its exit code.

Every exception carries one sentence for the cause and, where there is one, one for the remedy.
`cli.py` alone turns them into words and exit codes; everything else only raises them.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What the process returns to its caller; the same in every command."""

    DONE = 0
    BUG = 1
    USAGE = 2
    INPUT_REJECTED = 3
    IO = 4
    VERIFICATION_FAILED = 5
    ENVIRONMENT = 6
    INTERRUPTED = 130


class Q6KConvertError(Exception):
    """Base of every expected failure: a cause, a remedy and an exit code."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy


class UsageError(Q6KConvertError):
    """The command line asks for something that makes no sense."""

    exit_code = ExitCode.USAGE


class InputRejectedError(Q6KConvertError):
    """A file given as input breaks the rules of its format, or holds what cannot be converted.

    Args:
        path: the file.
        item: what in it is wrong: a key, a tensor, a header field.
        offset: where in the file, in bytes from its start; None where no one place is to blame.
        problem: what was expected and what was found.
        remedy: what the user can do.
    """

    exit_code = ExitCode.INPUT_REJECTED

    def __init__(
        self,
        path: Path,
        item: str,
        problem: str,
        *,
        offset: int | None = None,
        remedy: str = "The file is damaged or not what it claims to be: download or export it again.",
    ) -> None:
        where = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{path}: {item}{where}: {problem}", remedy)
        self.path = path
        self.item = item
        self.offset = offset


class IOFailedError(Q6KConvertError):
    """Reading or writing failed, or the output place is taken."""

    exit_code = ExitCode.IO


class VerificationFailedError(Q6KConvertError):
    """What was made is not what it was made from."""

    exit_code = ExitCode.VERIFICATION_FAILED


class EnvironmentMissingError(Q6KConvertError):
    """The installation or the machine lacks a piece the command needs."""

    exit_code = ExitCode.ENVIRONMENT


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C or a termination signal.

    Like every KeyboardInterrupt it is no Exception, so that a library that catches those lets it pass.
    """

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
