#!/usr/bin/env python3
"""Compare ways to load a model; print a table and write JSON.

    python scripts/bench/bench_loading.py MODEL.gguf... [--threads 2] [--tokens 16] [--json FILE]
    python scripts/bench/bench_loading.py --device cuda --shapes llama-8b gemma-27b [--mix q4_k_m] [--json FILE]

All give transformers' class, of a bundle that is made before anything is timed, with exact scales:

    bundle           `load_model`
    from_pretrained  `AutoModelForCausalLM.from_pretrained` of the same bundle
    transformers     `AutoModelForCausalLM.from_pretrained(gguf_file=...)`, which expands all weights and takes the
                     package accelerate; on a CPU only

Each runs in a process of its own, with the same number of threads and the same prompt.

On a CPU they are in fp32. Measured are the time to load (imports are part), the peak of the process's memory, and
tokens a second of decoding after the prompt: by `Generator`, and the last by `generate`. Times are elapsed, and of
the CPU, which other work on the machine disturbs less. What cannot be loaded is a row that says why.

On a GPU they are in bf16, of files or of shapes with random weights. Each process loads three times; the median of
the last two counts, with all kernels compiled. Measured are the time, the peak of torch's allocator while it loads,
what the model holds, and the peak of the process's memory. `from_pretrained` beside `load_model` has targets.

Files are in the page cache.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_convert import machine
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.models.hub_files import CONFIG, config
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from q6k_kernels.weights.reader import open_bundle
from synthetic_gpt_oss import SHAPES
from synthetic_model import MIXES, write_model

Row = dict[str, Any]
TEXT = "The capital of France is a city that has been known for its museums, its food and its river for"
OURS, PRETRAINED, EXPANDED = "bundle", "from_pretrained", "transformers"
LOADERS = {"cpu": (OURS, PRETRAINED, EXPANDED), "cuda": (OURS, PRETRAINED)}
MOST = {"seconds": 1.2, "peak_bytes": 1.01, "host_peak_bytes": 1.2}
"""What `from_pretrained` takes on a GPU, at most so many times what `load_model` does."""
COLUMNS = {
    "cpu": (
        ("load, s", "load_seconds", 1, ".2f"),
        ("of CPU", "load_cpu_seconds", 1, ".2f"),
        ("peak, MB", "peak_bytes", 1e6, ".0f"),
        ("tokens/s", "tokens_per_second", 1, ".2f"),
        ("per s of CPU", "tokens_per_cpu_second", 1, ".2f"),
    ),
    "cuda": (
        ("load, s", "seconds", 1, ".2f"),
        ("first, s", "first_seconds", 1, ".2f"),
        ("peak, MB", "peak_bytes", 1e6, ".0f"),
        ("held, MB", "held_bytes", 1e6, ".0f"),
        ("process, MB", "host_peak_bytes", 1e6, ".0f"),
    ),
}
"""Columns of the table: title, figure, unit and form."""


def load(loader: str, path: Path, device: str) -> Any:
    """Load a model."""
    import torch
    import transformers

    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if loader == OURS:
        from q6k_kernels import load_model

        return load_model(path, device=device, dtype=dtype, weights="auto")
    where: Row = {"device_map": {"": device}} if on_gpu else {}
    if loader == EXPANDED:
        path, where = path.parent, where | {"gguf_file": path.name}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where)


def measure_on_gpu(loader: str, path: Path) -> Row:
    """Load a model three times, and return what that took; for a process of its own."""
    import torch

    from bench_model_facts import held_bytes, load_the_classes

    load_the_classes()
    torch.zeros(1, device="cuda")  # start CUDA outside of the timing
    seconds = list[float]()
    for _ in range(3):
        model = None  # free it before the next one is loaded
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = load(loader, path, "cuda")
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "first_seconds": seconds[0],
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "held_bytes": held_bytes(model) if model is not None else 0,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu": torch.cuda.get_device_name(),
    }


def measure(loader: str, path: Path, ids: list[int], tokens: int, threads: int) -> Row:
    """Load a model on the CPU, decode with it, and return what that took; for a process of its own."""
    import torch
    import transformers  # noqa: F401 -- all ways take it; their own imports count

    torch.set_num_threads(threads)
    before = _clocks()
    model = load(loader, path, "cpu")
    row: Row = dict(zip(("load_seconds", "load_cpu_seconds"), _since(before), strict=True))
    decode = by_transformers if loader == EXPANDED else by_generator
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
    """Return what `measure` or `measure_on_gpu` finds in a new process, or the last line of its error."""
    given = json.dumps([args.device, loader, str(path), ids, args.tokens, args.threads])
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


def judge(row: Row, ours: Row) -> None:
    """Say how many times what `load_model` takes `from_pretrained` takes, and whether that is few enough."""
    if row["loader"] == PRETRAINED and MOST.keys() <= row.keys() & ours.keys():
        row["times"] = {name: row[name] / ours[name] for name in MOST}
        row["targets"] = [
            {"target": f"{name} {most} x load_model's", "met": row["times"][name] <= most}
            for name, most in MOST.items()
        ]


def line(row: Row, device: str) -> str:
    """Return a row of the table."""
    head = f"{row['model']:<28}{row['loader']:<17}"
    if "problem" in row:
        return f"{head}  {row['problem']}"
    cells = "".join(f"{format(row[name] / unit, form):>14}" for _, name, unit, form in COLUMNS[device])
    met = [
        f"{times:.2f} of {each['target']} {'met' if each['met'] else 'MISSED'}"
        for times, each in zip(row.get("times", {}).values(), row.get("targets", []), strict=True)
    ]
    return f"{head}{cells}  {', '.join(met)}".rstrip()


def heading(device: str) -> str:
    """Return the table's heading."""
    return f"{'model':<28}{'loader':<17}" + "".join(f"{title:>14}" for title, *_ in COLUMNS[device])


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
    add("--shapes", choices=SHAPES, nargs="+", default=[], metavar="SHAPE", help="shapes with random weights")
    add("--mix", choices=MIXES, default="q4_k_m", help="types of their weights, as llama.cpp mixes them")
    add("--device", choices=tuple(LOADERS), default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--tokens", type=int, default=16, metavar="N", help="tokens of the answer; the first is not timed")
    add("--json", type=Path, default=Path("bench-loading.json"), metavar="FILE")
    add("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.measure and (not (args.models or args.shapes) or args.threads < 1 or args.tokens < 2):
        parser.error("expected one model or shape or more, --threads of 1 or more, --tokens of 2 or more")
    if args.shapes and args.device == "cpu":
        parser.error("--shapes have no text to go on with: they take --device cuda")
    return args


def converted(model: Path, bundle: Path) -> None:
    """Convert a model, and write the one file that `from_pretrained` wants beside the bundle's own."""
    convert_gguf(model, bundle, Options(scales="exact"))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in open_bundle(bundle).manifest.tensors}
    content = config(read_metadata(bundle), shapes, weights="auto")
    (bundle / CONFIG).write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Parse the options, measure each model in each way, and print."""
    args = parsed()
    if args.measure:
        device, loader, path, ids, tokens, threads = json.loads(args.measure)
        on_gpu = device == "cuda"
        row = measure_on_gpu(loader, Path(path)) if on_gpu else measure(loader, Path(path), ids, tokens, threads)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as folder:
        about = machine(Path(folder)) | versions()
        used = {"device": args.device, "threads": args.threads}
        used |= {"dtype": "bf16"} if args.device == "cuda" else {"dtype": "fp32", "tokens": args.tokens}
        report: Row = {**about, **used, "rows": []}
        print(json.dumps({key: value for key, value in report.items() if key != "rows"}))
        print(heading(args.device), flush=True)
        for model in (*args.models, *(Path(folder) / f"{shape}-{args.mix}.gguf" for shape in args.shapes)):
            if model.parent == Path(folder):
                shape = model.stem.removesuffix(f"-{args.mix}")
                write_model(model, SHAPES[shape], len(os.sched_getaffinity(0)), args.mix)
            bundle = Path(folder) / model.stem
            converted(model, bundle)
            ids = load_tokenizer(bundle).encode(TEXT) if args.device == "cpu" else []
            rows = dict[str, Row]()
            for loader in LOADERS[args.device]:
                path = model.resolve() if loader == EXPANDED else bundle
                row = {"model": model.stem, "loader": loader, "prompt_tokens": len(ids)}
                row |= in_a_process(loader, path, ids, args)
                rows[loader] = row
                judge(row, rows[OURS])
                report["rows"].append(row)
                print(line(row, args.device), flush=True)
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
