"""Turn every failure into a message and an exit code, and measure the peak memory of a run."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from q6k_convert.errors import ExitCode, InterruptedRunError, IOFailedError, Q6KConvertError

if TYPE_CHECKING:
    from q6k_convert.cli.terminal import Terminal


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def reporting(as_json: bool, quiet: bool, verbose: bool) -> Iterator[Terminal]:
    """Turn any exception raised inside into a message and an exit code."""
    from q6k_convert.cli.streams import naming_stdout
    from q6k_convert.cli.terminal import Terminal
    from q6k_kernels.bundle.manifest import BundleError
    from q6k_kernels.errors import (
        CudaError,
        ExportFailedError,
        GgufReadError,
        GgufRejectedError,
        ModelError,
        PackageMissingError,
    )

    if sys.stderr is None:  # closed by the caller, who wants no messages
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    terminal = Terminal(as_json=as_json, quiet=quiet)

    def fail(code: ExitCode, cause: str, remedy: str = "") -> NoReturn:
        if verbose:
            terminal.traceback()
        terminal.error(cause, remedy)
        try:
            terminal.document({"status": "error", "exit_code": int(code), "error": cause, "remedy": remedy})
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            stdout_lost()
        raise typer.Exit(int(code))

    try:
        if sys.stdout is None:
            raise IOFailedError("stdout is closed", "Give it a place: `> FILE`, or `> /dev/null`.")
        with _interruptible():
            yield terminal
            with naming_stdout():
                sys.stdout.flush()
    except (Q6KConvertError, InterruptedRunError) as error:
        fail(error.exit_code, error.cause, error.remedy)
    except (CudaError, ExportFailedError, PackageMissingError) as error:
        fail(ExitCode.ENVIRONMENT, error.cause, error.remedy)
    except GgufReadError as error:
        fail(ExitCode.IO, error.cause, error.remedy)
    except (GgufRejectedError, ModelError) as error:
        fail(ExitCode.INPUT_REJECTED, error.cause, error.remedy)
    except BundleError as error:
        fail(ExitCode.INPUT_REJECTED, str(error), "Make the bundle again from its GGUF file.")
    except BrokenPipeError:
        # The reader of stdout has gone: there is nobody to print an error for.
        stdout_lost()
        raise typer.Exit(int(ExitCode.IO)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(ExitCode.IO, f"{where}{error.strerror or error}", "Check the disk, the path and its permissions.")
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        fail(
            ExitCode.BUG,
            f"{type(error).__name__}: {error}",
            "This is a bug in q6k-convert: run again with --verbose and report the traceback.",
        )


def stdout_lost() -> None:
    """Give up what stdout cannot take, or the interpreter would try again when it ends, and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise InterruptedRunError when a signal asks to stop, also where another exception comes of it."""
    signals = list[int]()

    def interrupt(number: int, _frame: object) -> NoReturn:
        # One signal is enough: a second one must not cut the clean-up short.
        for each in _STOPPING:
            signal.signal(each, signal.SIG_IGN)
        signals.append(number)
        raise _interrupted(number)

    before = {number: signal.getsignal(number) for number in _STOPPING}
    for number, handler in before.items():
        # `nohup` and a shell's background jobs set some of these signals to be ignored.
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        # An import that is interrupted may fail in its own way.
        if signals:
            raise _interrupted(signals[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int) -> InterruptedRunError:
    return InterruptedRunError(f"interrupted ({signal.Signals(number).name})", "Run the same command again.")


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    try:
        # Linux's ru_maxrss starts from the parent's peak; VmHWM does not.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
