"""The failures of commands, each with its exit code.

Every exception carries one sentence for the cause and, where there is one, one for the remedy.
`cli/reporting.py` alone turns them, and those of `q6k_kernels.errors`, into words and exit codes.
"""

from __future__ import annotations

from enum import IntEnum


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
    """What is given as input, a file or what the Hub has, cannot be converted as asked."""

    exit_code = ExitCode.INPUT_REJECTED


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
