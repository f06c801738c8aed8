"""Exceptions of commands, each with its exit code.

Every exception carries one sentence for the cause and, where there is one, one for the remedy.
Only `cli/reporting.py` prints them and the errors of `q6k_kernels.errors`, and turns them into exit codes.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the process, the same for every command."""

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
    """Error in the command line: an option is invalid, or options contradict each other."""

    exit_code = ExitCode.USAGE


class InputRejectedError(Q6KConvertError):
    """Error in the input: a file, or a repository of the Hub, cannot be converted as asked."""

    exit_code = ExitCode.INPUT_REJECTED


class IOFailedError(Q6KConvertError):
    """Error of reading or writing, or an output path that is taken."""

    exit_code = ExitCode.IO


class VerificationFailedError(Q6KConvertError):
    """Error of verification: an output does not match its source."""

    exit_code = ExitCode.VERIFICATION_FAILED


class EnvironmentMissingError(Q6KConvertError):
    """Error of the environment: a package, a tool or a device that the command needs is missing."""

    exit_code = ExitCode.ENVIRONMENT


class InterruptedRunError(KeyboardInterrupt):
    """Interruption by Ctrl-C or a termination signal.

    A KeyboardInterrupt is not an Exception, so libraries that catch every Exception let it pass.
    """

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
