#!/usr/bin/env python3
"""Measure several texts at once: tokens a second of all together, beside one text alone.

    python scripts/bench/bench_texts.py [--shape SHAPE] [--mix MIX] [--texts N ...] [--context N] [--tokens N]
        [--keep DIR] [--json FILE] [--profile]
    python scripts/bench/bench_texts.py --device cpu --shape tiny --context 16 --tokens 8 --texts 1 2

1. Write a GGUF of a shape as of Llama 3.1 8B with random weights, and convert it, as bench_model.py does.
2. Decode `--tokens` tokens of one text after `--context` by `Generator`, the likeliest each time.
3. Decode as many of each of `--texts` texts by `Texts`, after prompts that differ: the likeliest tokens, no stop
   token. The host reads every token. Joining and the first steps, which record the graphs, are not counted.
4. With --profile: list the kernels of the steps, and the gaps between them.

Rates are medians of `--rounds` runs. Targets are of Llama 3.1 8B in Q6_K on an H200. "first other token" is where
the answer of a text first differs from that of the same text alone, the median of four texts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench_model_facts import machine
from profile_kernels import profiled, table
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_convert.run.speed import decoding, random_ids, times_of, wait
from q6k_kernels import load_model
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.texts import Text, Texts
from synthetic_gpt_oss import SHAPES
from synthetic_model import MIXES, write_model

TARGETS = {8: 5.5, 32: 14.0}
"""Tokens a second of so many texts, in times of one alone."""
FIRST_STEPS, COMPARED, PROFILED = 4, 4, 16
"""Steps that do not count, texts that also run alone, and steps that are profiled."""
HEADING = f"{'':>14}{'tokens/s':>11}{'ms/step':>9}{'x one':>7}{'target':>8}{'first other token':>19}"


def prompt(at: int, length: int, vocabulary: int) -> list[int]:
    """Return the prompt of a text, another for each."""
    return random_ids(length + at, vocabulary)[at:]


def alone(model: Any, length: int, tokens: int, vocabulary: int, rounds: int) -> float:
    """Return the tokens a second of one text by `Generator`."""
    generator = Generator(model, capacity=length + tokens + 1, fused=True)
    decode, prepare = decoding(generator, prompt(0, length, vocabulary), tokens)
    prepare()
    decode()
    times = times_of(decode, prepare, rounds, model.device)
    return tokens * 1e3 / statistics.median(times.ms)


def together(model: Any, count: int, args: argparse.Namespace, vocabulary: int) -> tuple[dict[str, Any], Any]:
    """Return the row of several texts, and with --profile the kernels of their steps."""
    steps = args.tokens
    limit = 1 + FIRST_STEPS + steps + PROFILED
    texts, milliseconds, profile = Texts(model, capacity=args.context + limit, places=count), list[float](), None
    differs: int | None = None
    for at_round in range(args.rounds + 1):  # the first records the graphs
        names = {texts.join(prompt(at, args.context, vocabulary), limit): at for at in range(count)}
        answers = [list[int]() for _ in names]

        def read(number: int, names: dict[Text, int] = names, answers: list[list[int]] = answers) -> None:
            for _ in range(number):
                for text, token in texts.step():
                    if token is not None:
                        answers[names[text]].append(token)

        read(1 + FIRST_STEPS)  # and the first tokens, from the prompts
        start = time.perf_counter()
        read(steps)
        if at_round:
            milliseconds.append((time.perf_counter() - start) * 1e3 / steps)
        elif args.profile and count > 1:
            profile = profiled(lambda: read(PROFILED), f"{count} texts @{args.context}", PROFILED)
            print(table(profile), flush=True)
        for text in list(texts.here):
            texts.leave(text)
        wait(model.device)
        if not at_round:
            differs = first_other(model, answers, args, vocabulary)
    step = statistics.median(milliseconds)
    row = {"texts": count, "ms": step, "tokens_per_s": count * 1e3 / step, "first_other_token": differs}
    return row | {"cache_bytes": texts.nbytes, "all_ms": milliseconds}, profile


def first_other(model: Any, answers: list[list[int]], args: argparse.Namespace, vocabulary: int) -> int | None:
    """Return the token from which on answers differ from those of the same texts alone, the median of some."""
    generator = Generator(model, capacity=args.context + len(answers[0]), fused=True)
    found = []
    for at, answer in enumerate(answers[:COMPARED]):
        generator.reset()
        generator.prefill(prompt(at, args.context, vocabulary))
        pairs = zip(generator.generate(len(answer)), answer, strict=True)
        same = [mine == theirs for mine, theirs in pairs]
        found.append(same.index(False) if False in same else len(same))
    median = int(statistics.median(found))
    return median if median < len(answers[0]) else None


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    words = f"{row['texts']} texts" if row["texts"] else "1 by Generator"
    target = (
        "" if row["target"] is None else f"{row['target']:g} {'yes' if row['times'] >= row['target'] else 'NO'}"
    )
    other = "" if row["first_other_token"] is None else str(row["first_other_token"])
    return f"{words:>14}{row['tokens_per_s']:>11.1f}{row['ms']:>9.3f}{row['times']:>7.2f}{target:>8}{other:>19}"


def run(args: argparse.Namespace, folder: Path) -> None:
    """Run all steps, print the table, and write the JSON."""
    device, shape = torch.device(args.device), SHAPES[args.shape]
    report: dict[str, Any] = {"machine": machine(device), "options": {}, "rows": [], "profiles": []}
    report["options"] = {key: value for key, value in vars(args).items() if key not in ("keep", "json", "profile")}
    source, bundle = folder / f"{shape.name}-{args.mix}.gguf", folder / f"{shape.name}-{args.mix}"
    if not source.exists():
        write_model(source, shape, len(os.sched_getaffinity(0)), args.mix)
    if not bundle.exists():
        convert_gguf(source, bundle, Options())
    model = load_model(bundle, device=device, activations=args.activations)
    print(f"{json.dumps(report['machine'])}\n{HEADING}", flush=True)
    one = alone(model, args.context, args.tokens, shape.vocabulary, args.rounds)
    rows: list[dict[str, Any]] = [{"texts": 0, "ms": 1e3 / one, "tokens_per_s": one, "first_other_token": None}]
    on_target = (args.shape, args.mix, args.device) == ("llama-8b", "q6_k", "cuda")
    for count in [0, *args.texts]:
        if count:
            row, profile = together(model, count, args, shape.vocabulary)
            rows.append(row)
            report["profiles"] += [profile] if profile else []
        row = rows[-1]
        row |= {"times": row["tokens_per_s"] / one, "target": TARGETS.get(count) if on_target else None}
        print(line(row), flush=True)
        report["rows"] = rows
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--mix", choices=MIXES, default="q6_k", help="types of the weights, as llama.cpp mixes them")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--activations", choices=("auto", "int8", "bf16"), default="auto")
    add("--texts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N", help="texts at once")
    add("--context", type=int, default=512, metavar="N", help="tokens of each prompt")
    add("--tokens", type=int, default=128, help="tokens to decode of each text")
    add("--rounds", type=int, default=3)
    add("--keep", type=Path, metavar="DIR", help="keep the GGUF and the bundle in DIR, and reuse them")
    add("--json", type=Path, default=Path("bench-texts.json"), metavar="FILE")
    add("--profile", action="store_true", help="profile the steps")
    args = parser.parse_args(arguments)
    if min(*args.texts, args.context, args.tokens, args.rounds) < 1 or max(args.texts) > max(TARGETS):
        parser.error("expected numbers of 1 or more, and at most 32 texts")
    return args


def main() -> None:
    """Parse the options, measure, print and write."""
    args = parsed()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_texts: torch sees no CUDA GPU; --device cpu --shape tiny shows what is measured")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        run(args, args.keep)
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
