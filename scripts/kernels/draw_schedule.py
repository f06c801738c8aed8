#!/usr/bin/env python3
"""Draw the schedule of a model's persistent kernel, as a table or as a picture: what follows what, and how long.

    python scripts/kernels/draw_schedule.py OUT/ [--gbs 4000] [--between 2] [--context 2048] [--svg FILE]

OUT/ is a bundle. No GPU is needed; the model is loaded on the CPU. Times are estimates, and no measurement enters
them but those that you give: bytes go at `--gbs` GB/s, and before each product that awaits values of other blocks
`--between` microseconds pass from the end of what comes before. Meanwhile bytes come in until the rings are full,
and that is all that runs ahead. Attention reads the keys and values of `--context` tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

import torch

from q6k_kernels import load_model
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.errors import ExplainedError
from q6k_kernels.formats.ggml import super_blocks
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.persist_cuda import STAGES
from q6k_kernels.generate.planning import Planner
from q6k_kernels.generate.schedule import ATTENTION, NORM, SAME, WARPS, Schedule
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_reference import TorchOperations

PRODUCTS: Final = "products"
BETWEEN: Final = "between"
LANES = PRODUCTS, BETWEEN
COLOURS = {PRODUCTS: "#4878a8", BETWEEN: "#d08040"}
MICROSECOND, LANE, LINE, MARGIN = 8, 18, 56, 90  # sizes in the picture, in its units


@dataclass(frozen=True)
class Pace:
    """What times are made of.

    Attributes:
        gbs: GB/s.
        between: microseconds from the end of a product to the beginning of one that awaits its outputs.
        context: tokens whose keys and values attention reads.
        ahead: bytes for which the rings have room.
    """

    gbs: float
    between: float
    context: int
    ahead: int

    def of(self, nbytes: float) -> float:
        """Return the microseconds that bytes take."""
        return nbytes / self.gbs / 1e3


@dataclass(frozen=True)
class Span:
    """What happens from one time to another, in microseconds.

    Attributes:
        lane: bytes of products, which come with pauses where rings are full, or what lies between them.
        name: a layer's weight, or what is done.
        layer: its layer; "" for none.
        size: (N, K) of a weight; of attention its query heads' values and the tokens.
        nbytes: bytes that are read.
        fullest: units of the fullest block, by those of the average one; 0 where there are none.
    """

    lane: Literal["products", "between"]
    name: str
    layer: str
    begin: float
    end: float
    size: tuple[int, int]
    nbytes: int
    fullest: float


def spans(schedule: Schedule, names: dict[int, str], pace: Pace) -> Iterator[Span]:
    """Place the rows of a schedule in time.

    Args:
        schedule: the rows.
        names: names of weights, by the address of their tiles.
        pace: what times are made of.
    """
    loading, done, layer = _Loading(pace), 0.0, ""
    for (kind, _), group in groupby(schedule.rows, key=lambda row: (row.kind, row.tag)):
        rows = list(group)
        if kind == ATTENTION:
            (row,) = rows
            tokens = min(pace.context, row.window or pace.context)
            nbytes = row.n // row.group * tokens * 2 * 2
            end = done + pace.between + pace.of(nbytes)
            yield Span(BETWEEN, "attention", layer, done, end, (row.n, tokens), nbytes, 0.0)
            loading.time = max(loading.time, done) + pace.of(nbytes)  # tiles come behind the keys
            done = end
            continue
        layer = _layer_of(names[rows[0].tiles])
        started = done + (0.0 if rows[0].source == SAME or not rows[0].input else pace.between)
        if started > done:
            what = "sum and norm" if rows[0].source == NORM else "values"
            yield Span(BETWEEN, what, layer, done, started, (1, rows[0].k), 0, 0.0)
        loading.multiply(started)
        for row in rows:
            nbytes = row.row_tiles * super_blocks(row.k) * schedule.types[row.type].tile_bytes
            name, fullest = (
                names.get(row.tiles, names[rows[0].tiles]).rpartition(".")[2],  # or another piece of the same
                -(-row.total // schedule.grid) * schedule.grid / row.total,
            )
            for begin, end, part in loading.load(nbytes):
                yield Span(PRODUCTS, name, layer, begin, end, (row.n, row.k), part, fullest)
        done = max(loading.time, started)


class _Loading:
    """Bytes of tiles, which come one after another as long as the rings have room.

    Attributes:
        time: when the last ones have come.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace, self.time, self._loaded = pace, 0.0, 0
        self._waits = deque[tuple[int, float]]()  # from a byte on, none comes before a time

    def multiply(self, started: float) -> None:
        """Note when the next bytes are multiplied, which gives their room to those that come so much later."""
        self._waits.append((self._loaded + self._pace.ahead, started))

    def load(self, nbytes: int) -> list[tuple[float, float, int]]:
        """Load the next bytes; return when their parts begin and end to come, and the bytes of each."""
        parts, end = list[tuple[float, float, int]](), self._loaded + nbytes
        while self._loaded < end:
            while self._waits and self._waits[0][0] <= self._loaded:
                self.time = max(self.time, self._waits.popleft()[1])
            part = (min(end, self._waits[0][0]) if self._waits else end) - self._loaded
            begin, before = self.time, 0
            if parts and parts[-1][1] == begin:  # without a pause
                begin, _, before = parts.pop()
            self.time += self._pace.of(part)
            self._loaded += part
            parts.append((begin, self.time, before + part))
        return parts


def _layer_of(module: str) -> str:
    """Return the number of a layer in a module's name; "" for none."""
    return next((part for part in module.split(".") if part.isdigit()), "")


def table(all_spans: list[Span]) -> Iterator[str]:
    """Lay out spans as lines of text."""
    yield (
        f"{'begin us':>9} {'end us':>9} {'MB':>8}  {'layer':>5}  {'product':<22} {'between':<14} {'size':<14} "
        f"fullest block"
    )
    for span in all_spans:
        product, between = (span.name, "") if span.lane == PRODUCTS else ("", span.name)
        size = "x".join(map(str, span.size))
        fullest = f"{span.fullest:.2f}" if span.fullest else ""
        yield (
            f"{span.begin:9.2f} {span.end:9.2f} {span.nbytes / 1e6:8.2f}  {span.layer:>5}  {product:<22} "
            f"{between:<14} {size:<14} {fullest}"
        ).rstrip()


def summary(all_spans: list[Span], pace: Pace) -> str:
    """Say how long all takes, and how long its bytes alone."""
    end, nbytes = max(span.end for span in all_spans), sum(span.nbytes for span in all_spans)
    alone = pace.of(nbytes)
    return (
        f"{nbytes / 1e9:.3f} GB at {pace.gbs:g} GB/s: {alone:.0f} us; with {pace.between:g} us before each product "
        f"that waits, and {pace.ahead / 1e6:.1f} MB ahead: {end:.0f} us, {alone / end:.0%} of the time for bytes"
    )


def picture(all_spans: list[Span], title: str, line: float) -> str:
    """Draw spans as SVG: two lanes, continued in the next line every `line` microseconds."""
    lines = int(max(span.end for span in all_spans) // line) + 1
    width, height = MARGIN + line * MICROSECOND + 10, 40 + lines * LINE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" font-family="sans-serif" '
        f'font-size="9"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="6" y="20" font-size="12">{escape(title)}</text>'
    ]
    for at in range(lines):
        y = 40 + at * LINE
        parts.append(f'<text x="6" y="{y + 12}">{at * line:g} us</text>')
        parts += [
            f'<text x="{MARGIN - 6}" y="{y + 12 + LANE * lane}" text-anchor="end">{name}</text>'
            for lane, name in enumerate(LANES)
        ]
    for span in all_spans:
        for at in range(int(span.begin // line), int(span.end // line) + 1):
            begin, end = max(span.begin, at * line), min(span.end, (at + 1) * line)
            if end <= begin:
                continue
            x, wide = MARGIN + (begin - at * line) * MICROSECOND, (end - begin) * MICROSECOND
            y = 40 + at * LINE + LANE * LANES.index(span.lane)
            label = f"{span.layer} {span.name}".strip()
            parts.append(
                f"<g><title>{escape(label)}, {'x'.join(map(str, span.size))}, {span.nbytes / 1e6:.2f} MB, "
                f"{span.begin:.2f} to {span.end:.2f} us</title>"
                f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{LANE - 3}" fill="{COLOURS[span.lane]}" '
                f'stroke="#fff" stroke-width="0.5"/>'
            )
            if wide > 5 * len(label):
                parts.append(f'<text x="{x + 2:.2f}" y="{y + 11}" fill="#fff">{escape(label)}</text>')
            parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def planned(bundle: Path, multiprocessors: int, context: int) -> tuple[Schedule, dict[int, str]]:
    """Plan the step of a bundle's model for a GPU like an H200; return it and the names of its weights.

    Raises:
        ExplainedError: the bundle cannot be loaded, or a persistent kernel does not support the model.
    """
    model = load_model(bundle, dtype=torch.bfloat16, activations="int8")
    cache = KeyValueCache(model.config.get_text_config(decoder=True), context + 1, model.device)
    planner = Planner(replace(device_like(90), multiprocessors=multiprocessors), model.device, model.dtype)

    def note(
        hidden: torch.Tensor, position: torch.Tensor, through_the_model: Callable[[Any], object]
    ) -> torch.Tensor:
        del position
        through_the_model(planner)
        return hidden

    step = Step(model, cache, TorchOperations(), whole=note)  # type: ignore[arg-type]
    step.allocate()
    step(torch.zeros(1, dtype=torch.int64))
    names = {m.tiles.data_ptr(): name for name, m in model.named_modules() if hasattr(m, "tiles")}
    return planner.schedule(), names


def main(arguments: list[str] | None = None) -> int:
    """Parse the options and draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gbs", type=float, default=4000.0, help="GB/s at which weights come (4000)")
    parser.add_argument("--between", type=float, default=2.0, help="us before a product that awaits values (2)")
    parser.add_argument("--context", type=int, default=2048, help="tokens before this one (2048)")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (132, an H200)")
    parser.add_argument("--svg", type=Path, help="draw a picture in this file in place of the table")
    parser.add_argument("--line", type=float, default=150.0, help="us in a line of the picture (150)")
    args = parser.parse_args(arguments)
    try:
        schedule, names = planned(args.bundle, args.multiprocessors, args.context)
    except ExplainedError as error:
        print(f"error: {error.cause}\ntry: {error.remedy}", file=sys.stderr)
        return 1
    limit = device_like(90).shared_bytes
    stages = next(stages for stages in STAGES if schedule.shared_bytes(stages) <= limit)
    ahead = schedule.grid * WARPS * stages * schedule.stage_bytes
    pace = Pace(args.gbs, args.between, args.context, ahead)
    found = list(spans(schedule, names, pace))
    if args.svg:
        args.svg.write_text(
            picture(found, f"{args.bundle.name}: {summary(found, pace)}", args.line), encoding="utf-8"
        )
    else:
        print(*table(found), sep="\n")
    print(f"{len(schedule.rows)} rows, {schedule.grid} blocks, rings of {stages}; {summary(found, pace)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
