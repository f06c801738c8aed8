"""Entry point of `q6k-convert` and of `python -m q6k_convert`."""

from __future__ import annotations

import os
import signal
import sys

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the command line. A signal before or after a command's own work, as during imports, ends it quietly."""
    for number in _STOPPING:
        # `nohup` and a shell's background jobs set some of these signals to be ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(130))
    # Threads of torch that wait for others would take the processor from them where other programs run beside this
    # one. OpenMP reads this when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from q6k_convert.cli.main import main as run
    from q6k_convert.cli.reporting import stdout_lost
    from q6k_convert.errors import ExitCode

    try:
        try:
            run()
        finally:
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
    except OSError as error:  # of what is printed without a command's work: help and version
        stdout_lost()
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        sys.exit(int(ExitCode.IO))


if __name__ == "__main__":
    main()
