#!/usr/bin/env python3
"""Measure models on several GPUs beside one: tokens a second and memory of each rank; print a table and write JSON.

    python scripts/bench/bench_tp.py [--shapes SHAPE ...] [--mix q4_k_m|q5_k_m|q6_k|q8_0|mxfp4] [--ranks 1 2]
        [--steps own transformers] [--keep DIR] [--json FILE]
    python scripts/bench/bench_tp.py --device cpu --shapes tiny --ranks 1 2 --context 8 --prompts 16 --tokens 4

1. Write a GGUF of each shape with random weights of the types that llama.cpp chooses for the mix, and convert it.
2. For each number of ranks start as many processes, one GPU each. They load each bundle by `from_pretrained`,
   divided by transformers' plan, from the page cache.
3. Decode `--tokens` tokens after `--context`, and prefill each of `--prompts`, by our own step and by transformers'
   forward pass, both in CUDA graphs, see `Generator`. Recording comes before and is not counted.

Rates are medians of `--rounds` runs by the clock of the first rank; "x" is how many times they are those of one
rank. All ranks have to choose the same tokens. Memory is that of all parameters and buffers of a rank, and the peak
of torch's allocator while it loads. FILE may be one of an earlier run: rows that are not measured anew stay in it,
and one rank may be among them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from bench_model_facts import held_bytes, machine, read_all
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_convert.run.speed import decoding, prompting, random_ids, wait
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate.generator import Generator
from q6k_kernels.models.hub_files import CONFIG, config
from q6k_kernels.weights.reader import open_bundle
from synthetic_gpt_oss import SHAPES
from synthetic_model import MIXES, write_model

Row = dict[str, Any]
STARTED = time.perf_counter()
STEPS = {True: "own", False: "transformers"}
WHICH = ("shape", "ranks", "step")
"""What tells a row from others of a report."""
HEADING = (
    f"{'shape':<16}{'ranks':>6}  {'step':<14}{'decode, tokens/s':>18}{'prompt, tokens/s':>44}"
    f"{'held a rank, GB':>18}{'peak of loading':>17}{'load, s':>9}"
)


def main() -> None:
    """Parse the options, measure, print and write."""
    args = parsed()
    if args.device == "cuda" and torch.cuda.device_count() < max(args.ranks):
        sys.exit(f"bench_tp: {max(args.ranks)} ranks need as many GPUs; torch sees {torch.cuda.device_count()}")
    report = begun(args)
    print(json.dumps(report["machine"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bundles = {shape: made(folder, shape, args.mix) for shape in args.shapes}
        print(HEADING)
        for ranks in args.ranks:
            for row in measured(bundles, ranks, args, Path(temporary)):
                add(report["rows"], row)
                print(line(row), flush=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def begun(args: argparse.Namespace) -> Row:
    """Return a report without rows, or with those of an earlier run.

    Raises:
        SystemExit: the earlier run was on another machine, or had other options.
    """
    kept = {
        key: value for key, value in vars(args).items() if key not in ("keep", "json", "shapes", "ranks", "steps")
    }
    report: Row = {"machine": machine(torch.device(args.device)), "options": kept, "rows": []}
    if not args.json.exists():
        return report
    earlier: Row = json.loads(args.json.read_text(encoding="utf-8"))
    for part in ("machine", "options"):
        for name, value in report[part].items():
            if (found := earlier[part].get(name)) != value:
                sys.exit(
                    f"bench_tp: {args.json} was measured with {name} {found}, not {value}: give another --json"
                )
    return report | {"rows": earlier["rows"]}


def add(rows: list[Row], row: Row) -> None:
    """Put a row in the place of an earlier one, or behind all; say how fast ranks are beside one."""
    at = next((at for at, each in enumerate(rows) if _same(each, row, *WHICH)), len(rows))
    rows[at : at + 1] = [row]
    ones = {(each["shape"], each["step"]): each for each in rows if each["ranks"] == 1}
    for each in rows:
        one = ones.get((each["shape"], each["step"]), each)
        if one is not each:
            prompts = one["prompt_tokens_per_s"]
            each["times_one"] = {
                "decode": each["decode_tokens_per_s"] / one["decode_tokens_per_s"],
                **{tokens: rate / prompts[tokens] for tokens, rate in each["prompt_tokens_per_s"].items()},
            }


def _same(one: Row, other: Row, *names: str) -> bool:
    return all(one[name] == other[name] for name in names)


def made(folder: Path, shape: str, mix: str) -> Path:
    """Write and convert a model, unless an earlier run has done so, and read it into the page cache."""
    source, bundle = folder / f"{shape}-{mix}.gguf", folder / f"{shape}-{mix}"
    if not source.exists():
        write_model(source, SHAPES[shape], len(os.sched_getaffinity(0)), mix)
    if fresh := not bundle.exists():
        convert_gguf(source, bundle, Options())
    shapes = {tensor.name: tuple(tensor.shape) for tensor in open_bundle(bundle).manifest.tensors}
    content = json.dumps(config(read_metadata(bundle), shapes))
    (bundle / CONFIG).write_text(content, encoding="utf-8")
    if not fresh:  # what was written just now is in the page cache
        read_all(bundle)
    return bundle


def measured(bundles: dict[str, Path], ranks: int, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure all models on so many ranks, each in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = [folder / f"rank{rank}.json" for rank in range(ranks)]
    multiprocessing.spawn(work, (ranks, port, bundles, args, results), ranks)  # type: ignore[attr-defined,no-untyped-call]
    first, *others = (json.loads(path.read_text(encoding="utf-8")) for path in results)
    for row, *same in zip(first, *others, strict=True):
        if any(each["chosen"] != row["chosen"] for each in same):
            sys.exit(f"bench_tp: the ranks of {row['shape']} have chosen different tokens")
        for name in ("held_bytes", "peak_bytes"):
            row[name] = [row[name], *(each[name] for each in same)]
        del row["chosen"]
    return list(first)


def work(
    rank: int, ranks: int, port: int, bundles: dict[str, Path], args: argparse.Namespace, results: list[Path]
) -> None:
    """Measure all models as one of the ranks."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in named.items()}
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    rows = list[Row]()
    for shape, bundle in bundles.items():
        rows += rows_of_model(shape, bundle, ranks, device, args)
    results[rank].write_text(json.dumps(rows), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def rows_of_model(
    shape: str, bundle: Path, ranks: int, device: torch.device, args: argparse.Namespace
) -> list[Row]:
    """Load a model and measure it by each step that computes it."""
    on_gpu, before = device.type == "cuda", 0
    say(f"load {shape} on {ranks}")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    model = load(bundle, ranks, device)
    settle(device)
    loaded: Row = {
        "shape": shape,
        "ranks": ranks,
        "load_seconds": time.perf_counter() - start,
        "held_bytes": held_bytes(model),
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
    }
    capacity = -(-max(args.context + args.tokens + 2, *args.prompts) // 128) * 128
    rows = list[Row]()
    for fused in (each for each, step in STEPS.items() if step in args.steps):
        try:
            generator = Generator(model, capacity=capacity, fused=fused)
        except UnsupportedModelError as error:
            say(f"no row of {shape} by {STEPS[fused]} step: {error}")
            continue
        say(f"decode and prefill by {STEPS[fused]} step")
        rows.append(loaded | {"step": STEPS[fused]} | speeds(generator, SHAPES[shape].vocabulary, device, args))
        say(f"decode {rows[-1]['decode_tokens_per_s']:.1f}, prompts {rows[-1]['prompt_tokens_per_s']} tokens/s")
    return rows


def say(what: str) -> None:
    """Print what the first rank begins, so that a run that is cut off shows where."""
    if os.environ["RANK"] == "0":
        print(f"[{time.perf_counter() - STARTED:6.1f} s] {what}", flush=True)


def load(bundle: Path, ranks: int, device: torch.device) -> Any:
    """Load a bundle, or a rank's part of it."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where: Row = (
        {"device_map": {"": device}} if ranks == 1 else {"distributed_config": DistributedConfig(tp_plan="auto")}
    )
    return AutoModelForCausalLM.from_pretrained(bundle, dtype=dtype, **where)


def speeds(generator: Generator, vocabulary: int, device: torch.device, args: argparse.Namespace) -> Row:
    """Measure decoding and prompts."""
    chosen = list[int]()

    _, prepare = decoding(generator, random_ids(args.context, vocabulary), args.tokens)

    def decode() -> None:
        chosen[:] = generator.generate(args.tokens + 1)

    prepare()
    decode()
    row: Row = {"decode_tokens_per_s": args.tokens / median(decode, prepare, device, args.rounds)}
    row["prompt_tokens_per_s"] = {}
    for tokens in args.prompts:
        prefill, reset = prompting(generator, random_ids(tokens, vocabulary))
        reset()
        prefill()
        row["prompt_tokens_per_s"][str(tokens)] = tokens / median(prefill, reset, device, args.rounds)
    return row | {"chosen": chosen}


def median(work: Callable[[], object], before: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the seconds that work takes; `before` runs before each round, not counted."""
    seconds = list[float]()
    for _ in range(rounds):
        before()
        settle(device)
        start = time.perf_counter()
        work()
        settle(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def settle(device: torch.device) -> None:
    """Wait for the device, and for the other ranks."""
    wait(device)
    if dist.is_initialized():
        dist.barrier()


def line(row: Row) -> str:
    """Return a row of the table."""

    def rate(of: str, tokens_per_s: float, form: str) -> str:
        times = f" ({row['times_one'][of]:.2f}x)" if "times_one" in row else ""
        return f"{format(tokens_per_s, form)}{times}"

    prompts = ", ".join(
        f"{tokens}: {rate(tokens, each, ',.0f')}" for tokens, each in row["prompt_tokens_per_s"].items()
    )
    held, peak = (
        " ".join("-" if each is None else f"{each / 1e9:.2f}" for each in row[name])
        for name in ("held_bytes", "peak_bytes")
    )
    decode = rate("decode", row["decode_tokens_per_s"], ",.1f")
    return (
        f"{row['shape']:<16}{row['ranks']:>6}  {row['step']:<14}{decode:>18}{prompts:>44}{held:>18}{peak:>17}"
        f"{row['load_seconds']:>9.2f}"
    )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", choices=SHAPES, nargs="+", default=["llama-8b", "gemma-27b"], metavar="SHAPE")
    add("--mix", choices=MIXES, default="q4_k_m", help="types of the weights, as llama.cpp mixes them")
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    add(
        "--steps",
        choices=STEPS.values(),
        nargs="+",
        default=[*STEPS.values()],
        help="our own, transformers' or both",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--context", type=int, default=512, help="tokens before the decoded ones")
    add("--prompts", type=int, nargs="+", default=[512, 2048], metavar="N", help="lengths of the prompts in tokens")
    add("--tokens", type=int, default=128, help="tokens to decode")
    add("--rounds", type=int, default=3)
    add("--keep", type=Path, metavar="DIR", help="keep the GGUF and the bundle in DIR, and reuse them")
    add("--json", type=Path, default=Path("bench-tp.json"), metavar="FILE")
    args = parser.parse_args(arguments)
    if (least := min(*args.prompts, *args.ranks, args.context, args.tokens, args.rounds)) < 1:
        parser.error(f"prompts, ranks, context, tokens and rounds: expected 1 or more, found {least}")
    return args


if __name__ == "__main__":
    main()
