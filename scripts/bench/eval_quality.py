#!/usr/bin/env python3
"""Compare the perplexity of a packed model with that of the dequantised model; print a table, write JSON.

    python scripts/bench/eval_quality.py MODEL.gguf [--windows N] [--json FILE]
    python scripts/bench/eval_quality.py BUNDLE [--source MODEL.gguf]

The reference is the same transformers model in bf16 with dense weights: the GGUF's, dequantised by the `gguf`
package. The packed model runs with bf16 and with exact scales, each with int8 and with bf16 activations, forced for
all numbers of rows. A GGUF is converted first. A bundle has one kind of scales; without --source the reference uses
its unpacked weights.

The text, `eval_text.txt`, is in the public domain: the Declaration of Independence (1776), the Gettysburg Address
(1863), and the beginning of Lewis Carroll's Alice's Adventures in Wonderland (1865). It is cut into windows, each
of which begins with BOS, if the tokenizer has one, and is predicted alone. The error of the ratio is the standard
error of the difference to the reference, token by token.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_model import dense_model
from q6k_convert import convert_gguf
from q6k_convert.convert.plan import Options
from q6k_convert.run.perplexity import losses, perplexity_of, windows_of
from q6k_kernels import PackedLinear, load_model, open_bundle
from q6k_kernels.tokenizer.tokenizer import load_tokenizer

Row = dict[str, Any]
TEXT = Path(__file__).with_name("eval_text.txt")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALLOWED = 0.01
HEADING = f"{'scales':>10}{'activations':>13}{'perplexity':>12}{'ratio':>10}{'+-':>9}{'seconds':>9}"


class Evaluation:
    """One run, with its results in `report`."""

    def __init__(self, args: argparse.Namespace, bundles: dict[str, Path], source: Path | None) -> None:
        self._args, self._bundles, self._source = args, bundles, source
        self._device = torch.device(args.device)
        self._dtype = DTYPES[args.dtype]
        tokenizer = load_tokenizer(next(iter(bundles.values())), args.tokenizer)
        text = args.text.read_text(encoding="utf-8")
        self._windows = windows_of(tokenizer, text, args.window)[: args.windows]
        self.report: Row = {
            "model": str(args.model),
            "reference": "gguf.dequantize" if source else "the bundle's own weights",
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "dtype": args.dtype,
            "torch": torch.__version__,
            "text": args.text.name,
            "windows": len(self._windows),
            "window": args.window,
            "tokens": sum(len(window) - 1 for window in self._windows),
            "rows": [],
        }

    def run(self) -> None:
        """Run all evaluations, printing each row."""
        print(json.dumps({key: value for key, value in self.report.items() if key != "rows"}))
        print(HEADING, flush=True)
        start = time.perf_counter()
        dense = dense_model(next(iter(self._bundles.values())), self._source, self._device, self._dtype)
        reference = losses(dense, self._windows)
        del dense
        self._add({"scales": "dense", "activations": self._args.dtype}, reference, reference, start)
        for scales, bundle in self._bundles.items():
            model: Any = None  # free it before the next one is loaded
            model = load_model(bundle, device=self._device, dtype=self._dtype)
            for activations in self._args.activations:
                start = time.perf_counter()
                force(model, activations)
                found = losses(model, self._windows)
                self._add({"scales": scales, "activations": activations}, found, reference, start)

    def _add(self, row: Row, found: Tensor, reference: Tensor, start: float) -> None:
        row |= compared(found, reference)
        row["seconds"] = time.perf_counter() - start
        if found is not reference:
            row["met"] = abs(row["ratio"] - 1) <= ALLOWED
        self.report["rows"].append(row)
        print(line(row), flush=True)
        self._args.json.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def force(model: torch.nn.Module, activations: str) -> None:
    """Make all packed layers of a model multiply with the same kind of activations."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.activations = activations  # type: ignore[assignment]


def compared(found: Tensor, reference: Tensor) -> Row:
    """Return the perplexity, its ratio to the reference's, and the standard error of the ratio."""
    more = found - reference
    ratio = math.exp(float(more.mean()))
    error = ratio * float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    return {"perplexity": perplexity_of(float(found.mean())), "ratio": ratio, "ratio_error": error}


def line(row: Row) -> str:
    """Return a row of the table."""
    cells = f"{row['scales']:>10}{row['activations']:>13}{row['perplexity']:>12.4f}"
    if "met" not in row:
        return f"{cells}{'':>19}{row['seconds']:>9.1f}  the reference"
    verdict = f"within {ALLOWED:.0%} {'met' if row['met'] else 'MISSED'}"
    return f"{cells}{row['ratio']:>10.5f}{row['ratio_error']:>9.5f}{row['seconds']:>9.1f}  {verdict}"


def bundles_of(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], Path | None]:
    """Return bundles by their scales, converted first if a GGUF is given; and the GGUF."""
    if args.model.is_dir():
        return {open_bundle(args.model).manifest.options["scales"]: args.model}, args.source
    found = dict[str, Path]()
    for scales in args.scales:
        found[scales] = folder / f"{args.model.stem}-{scales}"
        if not found[scales].exists():
            convert_gguf(args.model, found[scales], Options(scales=scales))
    return found, args.model


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="a GGUF file, or a bundle")
    add("--source", type=Path, metavar="MODEL.gguf", help="GGUF that the bundle was made from")
    add(
        "--scales",
        nargs="+",
        choices=("bf16", "exact"),
        default=["bf16", "exact"],
        help="scales to convert a GGUF with",
    )
    add("--activations", nargs="+", choices=("int8", "bf16", "auto"), default=["int8", "bf16"])
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="bf16", help="dtype of activations and unpacked weights")
    add("--text", type=Path, default=TEXT, metavar="FILE")
    add("--tokenizer", type=Path, metavar="DIR", help="Hugging Face tokenizer, if the GGUF's fails")
    add("--window", type=int, default=512, metavar="TOKENS")
    add("--windows", type=int, metavar="N", help="evaluate only the first N windows")
    add("--keep", type=Path, metavar="DIR", help="keep a GGUF's bundles in DIR, and reuse them")
    add("--json", type=Path, default=Path("bench-quality.json"), metavar="FILE")
    args = parser.parse_args(arguments)
    if args.window < 3 or (args.windows is not None and args.windows < 1):
        parser.error("--window: expected 3 tokens or more, --windows: 1 or more")
    if args.source and not args.model.is_dir():
        parser.error("--source belongs to a bundle: a GGUF is its own source")
    if args.device == "cuda" and args.dtype == "fp32":
        parser.error("--dtype fp32 is for the CPU: GPU kernels take 16-bit activations")
    return args


def main() -> None:
    """Parse the options, evaluate and print; exit with 1 if a ratio is out of bounds."""
    args = parsed()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path()) as folder:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
        evaluation = Evaluation(args, *bundles_of(args, args.keep or Path(folder)))
        evaluation.run()
    if not all(row.get("met", True) for row in evaluation.report["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
