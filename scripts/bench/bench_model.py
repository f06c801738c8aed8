#!/usr/bin/env python3
"""Measure the speed of a whole model; print a table with targets and peers, and write JSON.

    python scripts/bench/bench_model.py [--shape SHAPE]
        [--mix q4_k_m|q5_k_m|q6_k|q8_0|mxfp4] [--scales bf16|exact] [--layers N] [--keep DIR]
        [--cache int8] [--persistent] [--json FILE] [--profile FILE]
    python scripts/bench/bench_model.py --device cpu --shape tiny --contexts 8 --prompts 16 --tokens 4

1. Write a GGUF of a shape as of Llama 3.1 8B, Gemma 4 31B, Qwen3.6-35B-A3B or gpt-oss 20B, random weights of the
   types that llama.cpp chooses for the mix, and convert it with q6k-convert.
2. Measure the bandwidth of a kernel that only reads.
3. Load the bundle twice from the page cache; the second time counts, with all kernels compiled.
4. Decode `--tokens` tokens after each of `--contexts`: the likeliest token each time, no stop token, read by the
   host as they come. Recording the graph comes before and is not counted.
5. Prefill prompts of each of `--prompts` tokens, from the call to the logits.
6. With --profile: list the kernels of each of these, and the gaps between them.
7. Measure the rate of a bf16 product of 8192 x 8192 x 8192; last, as it heats the GPU.

Rates are medians of `--rounds` runs. The roofline is the time of the bytes and products at the measured bandwidth
and rate. Memory is the peak of torch's allocator from before loading to the end. Peers come from
`peer_figures.json` and are shown on the GPU that they were measured on. The JSON is rewritten after each step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

import bench_model_rows as rows_of
import kernel_timing as timing
from bench_model_facts import held_bytes, load_the_classes, machine, needed_bytes, packed_bytes, read_all
from bench_model_rows import Row
from profile_kernels import profiled, table
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_convert.run.speed import decoding, prompting, random_ids, times_of, wait
from q6k_kernels import load_model
from q6k_kernels.formats.checks import Activations
from q6k_kernels.generate.cache_codes import CACHE_TYPES
from q6k_kernels.generate.generator import Generator
from synthetic_gpt_oss import SHAPES
from synthetic_model import MIXES, write_model
from synthetic_shapes import Shape

PEER_FIGURES = Path(__file__).with_name("peer_figures.json")
PROFILED_TOKENS = 32
CAPACITY_STEP = 128
"""Step of the cache's capacity: attention kernels are faster on whole tiles of slots."""


class Bench:
    """One run: its options, and the results in `report`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._shape: Shape = SHAPES[args.shape].with_layers(args.layers or SHAPES[args.shape].layers)
        self._device = torch.device(args.device)
        self._on_gpu = self._device.type == "cuda"
        self._peers: list[Row] = []
        self._started = time.perf_counter()
        self._profiles: list[Row] = []
        self.report: Row = {
            "machine": machine(self._device),
            "options": {key: value for key, value in vars(args).items() if key not in ("keep", "json", "profile")},
            "shape": vars(self._shape),
            "mix": args.mix,
            "ceilings": {},
            "phases": {},
            "rows": [],
        }
        figures = json.loads(PEER_FIGURES.read_text(encoding="utf-8"))
        self._codes = args.cache == "int8"
        whole = self._shape == SHAPES[args.shape] and not self._codes
        if whole and self.report["machine"].get("gpu") == figures["machine"]["gpu"]:
            of = {"peer": "llama.cpp", "shape": args.shape, "mix": args.mix}
            self._peers = [figure for figure in figures["whole_model"] if figure.items() >= of.items()]
        self._targets = rows_of.targets_of(self._shape, args.mix) if self._on_gpu and not self._codes else ()

    def run(self, folder: Path) -> None:
        """Run all steps, printing each result; files go to `folder`."""
        print(json.dumps(self.report["machine"]), flush=True)
        bundle = self._bundle(folder)
        if self._on_gpu:
            with self._phase("bandwidth"):
                nbytes = min(timing.READ_BYTES, torch.cuda.mem_get_info()[0] // 4) >> 12 << 12
                self.report["ceilings"]["read_gb_per_s"] = timing.read_gb_per_s(nbytes)
                torch.cuda.empty_cache()
            print(json.dumps(self.report["ceilings"]))
        model = self._loaded(bundle)
        needed = max(*(n + self._args.tokens + 1 for n in self._args.contexts), *self._args.prompts)
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        generator = Generator(
            model,
            capacity=capacity,
            fused=self._args.fused,
            cache_type=self._args.cache,
            persistent=self._args.persistent,
        )
        packed = needed_bytes(model, self._shape.experts[1] if self._shape.experts else 0)
        print(f"{rows_of.LEGEND}\n{rows_of.HEADING}")
        for context in self._args.contexts:
            self._decode(generator, context, packed)
        for tokens in self._args.prompts:
            self._prefill(generator, tokens, packed)
        self._memory(model, generator)
        if self._on_gpu:
            with self._phase("matmul rate"):
                self.report["ceilings"]["matmul_tflops"] = timing.matmul_tflops(8192)
            for row in self.report["rows"]:
                rows_of.judge(row, self.report["ceilings"], self._peers, self._targets)
        self.report["seconds"] = time.perf_counter() - self._started
        self._save()

    def _bundle(self, folder: Path) -> Path:
        """Write the model and convert it, unless an earlier run has done so."""
        name = f"{self._shape.name}-{self._shape.layers}-{self._args.mix}"
        source, bundle = folder / f"{name}.gguf", folder / f"{name}-{self._args.scales}"
        threads = len(os.sched_getaffinity(0))
        if not source.exists():
            with self._phase("write"):
                write_model(source, self._shape, threads, self._args.mix)
        self.report["gguf_bytes"] = source.stat().st_size
        if not bundle.exists():
            with self._phase("convert"):
                result = convert_gguf(source, bundle, Options(scales=self._args.scales))
            self.report["convert"] = {"seconds": result.seconds, "gb_per_s": result.bytes_in / result.seconds / 1e9}
            print(f"convert: {result.seconds:.2f} s, {result.bytes_in / result.seconds / 1e9:.2f} GB/s of GGUF")
        with self._phase("read files"):
            self.report["bundle_bytes"] = read_all(bundle)
        return bundle

    def _loaded(self, bundle: Path) -> Any:
        """Return the model, loaded for the second time."""
        if self._on_gpu:
            torch.zeros(1, device=self._device)  # start CUDA outside of the timing
            torch.cuda.reset_peak_memory_stats()
        load_the_classes()
        seconds = []
        for name in ("load", "load again"):
            model = None  # free it before the next one is loaded
            gc.collect()
            with self._phase(name):
                start = time.perf_counter()
                model = load_model(bundle, device=self._device, activations=self._args.activations)
                wait(self._device)
                seconds.append(time.perf_counter() - start)
        self._load_peak = torch.cuda.max_memory_allocated() if self._on_gpu else None
        row = {
            "what": "load",
            "first_seconds": seconds[0],
            "seconds": seconds[1],
            "gb_per_s": self.report["bundle_bytes"] / seconds[1] / 1e9,
        }
        self._add(row, rows_of.load_line)
        return model

    def _decode(self, generator: Generator, context: int, packed: int) -> None:
        decode, prepare = decoding(generator, random_ids(context, self._shape.vocabulary), self._args.tokens)
        with self._phase(f"record, decode @{context}"):
            prepare()
            decode()
        with self._phase(f"decode @{context}"):
            times = times_of(decode, prepare, self._args.rounds, self._device)
        self._add(
            rows_of.decode_row(
                self._shape, context, self._args.tokens, packed, times.ms, times.gpu_ms, codes=self._codes
            ),
            rows_of.line,
        )
        if self._args.profile:
            prepare()
            steps = min(PROFILED_TOKENS, self._args.tokens)
            self._profile(lambda: [*generator.generate(steps + 1)], f"decode @{context}, {steps} tokens", steps)

    def _prefill(self, generator: Generator, tokens: int, packed: int) -> None:
        prefill, reset = prompting(generator, random_ids(tokens, self._shape.vocabulary))
        with self._phase(f"prefill {tokens}"):
            for _ in range(2):
                reset()
                prefill()
            times = times_of(prefill, reset, self._args.rounds, self._device)
        row = rows_of.prefill_row(self._shape, tokens, packed, times.ms, times.gpu_ms, codes=self._codes)
        self._add(row, rows_of.line)
        if self._args.profile:
            reset()
            self._profile(prefill, f"prefill {tokens}", tokens)

    def _profile(self, work: Callable[[], object], name: str, steps: int) -> None:
        with self._phase(f"profile {name}"):
            found = profiled(work, name, steps)
        print(table(found), flush=True)
        self._profiles.append(found)
        _write(self._args.profile, self._profiles)

    def _memory(self, model: nn.Module, generator: Generator) -> None:
        packed = packed_bytes(model)
        row: Row = {"what": "memory", "packed_bytes": packed, "kv_bytes": generator.cache.nbytes}
        row["held_bytes"] = held_bytes(model)
        row["capacity"] = generator.capacity
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated()
            row |= {
                "load_peak_bytes": self._load_peak,
                "peak_bytes": peak,
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "share_of_packed": peak / packed,
                "share_of_needed": peak / (packed + row["kv_bytes"]),
            }
        self._add(row, rows_of.memory_line)

    def _add(self, row: Row, line: Callable[[Row], str]) -> None:
        rows_of.judge(row, self.report["ceilings"], self._peers, self._targets)
        self.report["rows"].append(row)
        print(line(row), flush=True)
        self._save()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Print when a phase begins, so that a run that is cut off shows where, and record its seconds."""
        start = time.perf_counter()
        print(f"[{start - self._started:6.1f} s] {name}", flush=True)
        yield
        self.report["phases"][name] = time.perf_counter() - start
        self._save()

    def _save(self) -> None:
        _write(self._args.json, self.report)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--mix", choices=MIXES, default="q6_k", help="types of the weights, as llama.cpp mixes them")
    add("--layers", type=int, metavar="N", help="use another number of layers than the shape has, for tuning")
    add("--scales", choices=("bf16", "exact"), default="bf16")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--activations", choices=get_args(Activations), default="auto")
    add("--fused", action=argparse.BooleanOptionalAction, default=True, help="decode with our own CUDA step")
    add("--cache", choices=CACHE_TYPES, default="model", help="numbers of keys and values; 8 bits have no targets")
    add("--persistent", action="store_true", help="decode by one kernel that runs a whole step")
    add("--contexts", type=int, nargs="+", default=[512, 2043], metavar="N", help="tokens before the decoded ones")
    add("--prompts", type=int, nargs="+", default=[512, 2048], metavar="N", help="lengths of the prompts in tokens")
    add("--tokens", type=int, default=128, help="tokens to decode")
    add("--rounds", type=int, default=5)
    add("--keep", type=Path, metavar="DIR", help="keep the GGUF and the bundle in DIR, and reuse them")
    add("--json", type=Path, default=Path("bench-model.json"), metavar="FILE")
    add("--profile", type=Path, metavar="FILE.json", help="profile each step, and write the figures to FILE")
    args = parser.parse_args(arguments)
    numbers = [*args.contexts, *args.prompts, args.tokens, args.rounds, args.layers or 1]
    if min(numbers) < 1:
        parser.error(f"contexts, prompts, tokens, rounds and layers: expected 1 or more, found {min(numbers)}")
    if args.profile and args.device == "cpu":
        parser.error("--profile is of kernels: it needs --device cuda")
    if args.persistent and (args.device == "cpu" or args.cache == "int8"):
        parser.error("--persistent is a kernel for a cache of 16 bits: it needs --device cuda and --cache model")
    if not args.fused and (args.persistent or args.cache == "int8"):
        parser.error("--persistent and --cache int8 are of our own step: leave --no-fused out")
    return args


def main() -> None:
    """Parse the options, measure, print and write."""
    args = parsed()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_model: torch sees no CUDA GPU; --device cpu --shape tiny shows what is measured")
    bench = Bench(args)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        bench.run(args.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as folder:
            bench.run(Path(folder))
    print(rows_of.summary(bench.report))


if __name__ == "__main__":
    main()
