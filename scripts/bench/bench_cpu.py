#!/usr/bin/env python3
"""Decode on the CPU: our forms of weights beside transformers, dequantised; print a table and write JSON.

    python scripts/bench/bench_cpu.py MODEL.gguf... [--threads 2] [--tokens 16] [--rounds 3] [--json FILE]

    transformers   `generate` of transformers' class in fp32, its weights dequantised by the gguf package
    bytes          `Generator`, a byte for each weight: what `generate` takes on a CPU
    packed         `Generator` on the packed reference, once with nothing beside it, as it takes long

Each has a process of its own, with the same threads, which sleep while they wait (OMP_WAIT_POLICY=PASSIVE, unless
it is set), and continues the same prompt. The processes take turns, once a round, while the others sleep; first
with nothing beside them, then beside two processes that do nothing but count. Shown are medians of tokens a second,
of the clock and of the CPU (other work on the machine disturbs these less), and the median of the ratios to
transformers, taken round by round. The target is 1 in each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench_convert import machine
from bench_loading import by_generator, by_transformers, versions
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_kernels.tokenizer.tokenizer import load_tokenizer

Row = dict[str, Any]
TEXT = "The capital of France is a city that has been known for its museums, its food and its river for"
CONTENDERS = ("transformers", "bytes", "packed")
BUSY = 2
"""Processes beside the second series."""
TARGET = 1.0
HEADING = (
    f"{'model':<28}{'beside':<9}{'who':<14}{'tokens/s':>10}{'per s of CPU':>14}"
    f"{'ratio':>8}{'of CPU':>8}{'target':>8}"
)


def work(who: str, bundle: Path, source: Path, ids: list[int], tokens: int, threads: int) -> None:
    """Load a model, and decode once for each line of stdin; in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    if who == "transformers":
        from dense_model import dense_model

        model, decode = dense_model(bundle, source, torch.device("cpu"), torch.float32), by_transformers
    else:
        from q6k_kernels import load_model

        form: Any = who
        model, decode = load_model(bundle, device="cpu", dtype=torch.float32, weights=form), by_generator
    print(flush=True)  # ready
    for _ in sys.stdin:
        with torch.no_grad():
            answer, (elapsed, cpu) = decode(model, ids, tokens)
        rates = {"tokens_per_second": (tokens - 1) / elapsed, "tokens_per_cpu_second": (tokens - 1) / cpu}
        print(json.dumps({**rates, "answer": answer}), flush=True)


class Worker:
    """A process that decodes when it is told to."""

    def __init__(self, who: str, arguments: list[Any], threads: int) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps([who, *arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | quiet,
        )
        self._answer()

    def decode(self) -> Row:
        """Decode once, and return the rates."""
        assert self._process.stdin is not None  # noqa: S101 -- a pipe
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        row: Row = json.loads(self._answer())
        return row

    def _answer(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 -- a pipe
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended early, with exit code {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that count, for ten minutes at most."""
    code = "import time\nend = time.time() + 600\nwhile time.time() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def series(workers: dict[str, Worker], rounds: int) -> dict[str, list[Row]]:
    """Let all decode in turn, `rounds` times."""
    found: dict[str, list[Row]] = {who: [] for who in workers}
    for _ in range(rounds):
        for who, worker in workers.items():
            found[who].append(worker.decode())
    return found


def summary(found: dict[str, list[Row]]) -> Iterator[Row]:
    """Yield a row for each: medians, and medians of ratios to transformers in the same round."""
    theirs = found[CONTENDERS[0]]
    for who, rows in found.items():
        row: Row = {"who": who, "rounds": len(rows), "same_answer": rows[0]["answer"] == theirs[0]["answer"]}
        for name in ("tokens_per_second", "tokens_per_cpu_second"):
            row[name] = statistics.median(each[name] for each in rows)
            ratios = [each[name] / other[name] for each, other in zip(rows, theirs, strict=False)]
            row[f"ratio_of_{name}"] = statistics.median(ratios)
        yield row


def line(row: Row) -> str:
    """Return a row of the table."""
    rates = f"{row['tokens_per_second']:>10.2f}{row['tokens_per_cpu_second']:>14.2f}"
    ratios = f"{row['ratio_of_tokens_per_second']:>8.2f}{row['ratio_of_tokens_per_cpu_second']:>8.2f}"
    target = f"{TARGET:>8.2f}" if row["who"] == "bytes" else ""
    return f"{row['model']:<28}{row['beside']:<9}{row['who']:<14}{rates}{ratios}{target}"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", type=Path, nargs="*", metavar="MODEL.gguf")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--tokens", type=int, default=16, metavar="N", help="tokens of the answer; the first is not timed")
    add("--rounds", type=int, default=3, metavar="N")
    add("--json", type=Path, default=Path("bench-cpu.json"), metavar="FILE")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.work and (not args.models or args.threads < 1 or args.tokens < 2 or args.rounds < 1):
        parser.error("expected one model or more, --threads and --rounds of 1 or more, --tokens of 2 or more")
    return args


def main() -> None:
    """Parse the options, measure each model, and print."""
    args = parsed()
    if args.work:
        who, bundle, source, *rest = json.loads(args.work)
        work(who, Path(bundle), Path(source), *rest)
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as folder:
        about = machine(Path(folder)) | versions() | {"threads": args.threads, "tokens": args.tokens}
        report: Row = {**about, "dtype": "fp32", "load_average": os.getloadavg()[0], "rows": []}
        print(json.dumps({key: value for key, value in report.items() if key != "rows"}))
        print(HEADING, flush=True)
        for model in args.models:
            bundle = Path(folder) / model.stem
            convert_gguf(model, bundle, Options(scales="exact"))
            ids = load_tokenizer(bundle).encode(TEXT)
            arguments = [str(bundle), str(model.resolve()), ids, args.tokens, args.threads]
            with ExitStack() as stack:
                workers = {who: Worker(who, arguments, args.threads) for who in CONTENDERS}
                for worker in workers.values():
                    stack.callback(worker.close)
                reference = {"packed": workers.pop("packed")}
                series(workers, 1)  # the first time memory is touched
                for beside, count in (("nothing", 0), (f"{BUSY} busy", BUSY)):
                    with busy(count):
                        found = series(workers, args.rounds)
                    if count == 0:
                        found |= series(reference, 1)
                    for row in summary(found):
                        row = {"model": model.stem[:27], "beside": beside, **row}
                        report["rows"].append(row)
                        print(line(row), flush=True)
                    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
