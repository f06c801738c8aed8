#!/usr/bin/env python3
"""Compare a bundle with transformers' own loading of the GGUF file, on the CPU; print a table and write JSON.

    python scripts/bench/bench_loading.py MODEL.gguf... [--threads 2] [--tokens 16] [--json FILE]

Both give transformers' class in fp32: `load_model` of a bundle, made with exact scales before anything is timed,
and `AutoModelForCausalLM.from_pretrained(gguf_file=...)`, which expands all weights and takes the package
accelerate. Each runs in a process of its own, with the same number of threads and the same prompt.
Measured are the time to load (imports are part), the peak of the process's memory, and tokens a second of decoding
after the prompt: ours by `Generator`, theirs by `generate`. Times are elapsed, and of the CPU, which other work on
the machine disturbs less. Files are in the page cache. What cannot be loaded is a row that says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_convert import machine
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_kernels.tokenizer.tokenizer import load_tokenizer

Row = dict[str, Any]
TEXT = "The capital of France is a city that has been known for its museums, its food and its river for"
HEADING = (
    f"{'model':<28}{'loader':<14}{'load, s':>9}{'of CPU':>9}{'peak, MB':>10}{'tokens/s':>10}{'per s of CPU':>14}"
)


def measure(loader: str, path: Path, ids: list[int], tokens: int, threads: int) -> Row:
    """Load a model, decode with it, and return what that took; for a process of its own."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    before = _clocks()
    if loader == "bundle":
        from q6k_kernels import load_model

        model: Any = load_model(path, device="cpu", dtype=torch.float32, weights="auto")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    row: Row = dict(zip(("load_seconds", "load_cpu_seconds"), _since(before), strict=True))
    decode = by_generator if loader == "bundle" else by_transformers
    answer, taken = decode(model.eval(), ids, tokens)
    row["tokens_per_second"], row["tokens_per_cpu_second"] = ((len(answer) - 1) / each for each in taken)
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row | {"answer": answer}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(before: tuple[float, float], now: tuple[float, float] | None = None) -> tuple[float, float]:
    elapsed, cpu = now or _clocks()
    return elapsed - before[0], cpu - before[1]


def by_generator(model: Any, ids: list[int], tokens: int) -> tuple[list[int], tuple[float, float]]:
    """Decode with `Generator`; return the answer, and what all but its first token took of clock and CPU."""
    from q6k_kernels.generate.generator import Generator

    generator = Generator(model, capacity=len(ids) + tokens)
    generator.prefill(ids)
    answer = generator.generate(tokens)
    first = next(answer)
    before = _clocks()
    rest = list(answer)
    return [first, *rest], _since(before)


def by_transformers(model: Any, ids: list[int], tokens: int) -> tuple[list[int], tuple[float, float]]:
    """Decode with transformers' `generate`, as `by_generator` does."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when each token comes; the prompt is the first."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def put(self, _value: object) -> None:
            self.times.append(_clocks())

        def end(self) -> None:
            pass

    clock, given = Clock(), torch.tensor([ids])
    more = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    out = model.generate(given, attention_mask=torch.ones_like(given), streamer=clock, **more)
    return out[0, len(ids) :].tolist(), _since(clock.times[1], clock.times[-1])


def in_a_process(loader: str, path: Path, ids: list[int], args: argparse.Namespace) -> Row:
    """Return what `measure` finds in a new process, or the last line of its error."""
    given = json.dumps([loader, str(path), ids, args.tokens, args.threads])
    done = subprocess.run(
        [sys.executable, __file__, "--measure", given],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)},
    )
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def line(row: Row) -> str:
    """Return a row of the table."""
    head = f"{row['model']:<28}{row['loader']:<14}"
    if "problem" in row:
        return f"{head}  {row['problem']}"
    load = f"{row['load_seconds']:>9.2f}{row['load_cpu_seconds']:>9.2f}{row['peak_bytes'] / 1e6:>10.0f}"
    return f"{head}{load}{row['tokens_per_second']:>10.2f}{row['tokens_per_cpu_second']:>14.2f}"


def versions() -> Row:
    """Return the versions of the packages that are compared."""
    names = ("torch", "transformers", "accelerate", "gguf")
    found = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions() if dist.name}
    return {name: found.get(name, "not installed") for name in names}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", type=Path, nargs="*", metavar="MODEL.gguf")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--tokens", type=int, default=16, metavar="N", help="tokens of the answer; the first is not timed")
    add("--json", type=Path, default=Path("bench-loading.json"), metavar="FILE")
    add("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.measure and (not args.models or args.threads < 1 or args.tokens < 2):
        parser.error("expected one model or more, --threads of 1 or more, --tokens of 2 or more")
    return args


def main() -> None:
    """Parse the options, measure each model in both ways, and print."""
    args = parsed()
    if args.measure:
        loader, path, ids, tokens, threads = json.loads(args.measure)
        print(json.dumps(measure(loader, Path(path), ids, tokens, threads)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as folder:
        about = machine(Path(folder)) | versions()
        report: Row = {**about, "dtype": "fp32", "threads": args.threads, "tokens": args.tokens, "rows": []}
        print(json.dumps({key: value for key, value in report.items() if key != "rows"}))
        print(HEADING, flush=True)
        for model in args.models:
            bundle = Path(folder) / model.stem
            convert_gguf(model, bundle, Options(scales="exact"))
            ids = load_tokenizer(bundle).encode(TEXT)
            for loader, path in (("bundle", bundle), ("transformers", model.resolve())):
                row = {"model": model.stem, "loader": loader, "prompt_tokens": len(ids)}
                row |= in_a_process(loader, path, ids, args)
                report["rows"].append(row)
                print(line(row), flush=True)
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
