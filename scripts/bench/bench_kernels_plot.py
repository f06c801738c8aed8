"""The figures of bench_kernels.py as one SVG, for light and dark pages: bandwidth at few rows, roofline over all.

Above, GB/s of packed bytes over M = 1..8 against the read bandwidth. Below, TFLOP/s over M on logarithmic
scales, under two roofs: what read bandwidth and the matrix product allow to packed bytes, and to 16 bits.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench_kernels_rows import BATCHED, SHAPES, Row, Shape

WIDTH = 960
STYLE = """\
svg { --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --ours: #0969da; --exact: #1a7f64; --cublas: #b35900;
  --pr: #a40e6b; --main: #6639ba; font: 12px system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --ours: #58a6ff;
  --exact: #3fb998; --cublas: #f0883e; --pr: #f778ba; --main: #b998ff; } }
text { fill: var(--soft); text-anchor: middle; } .title { fill: var(--ink); font-weight: 600; }
.head { fill: var(--ink); font-weight: 600; font-size: 15px; } .start { text-anchor: start; }
.end { text-anchor: end; } path { fill: none; } .grid { stroke: var(--line); }
.roof { stroke: var(--soft); stroke-width: 1.3; } .dense { stroke-dasharray: 2 3; }
.ours { --c: var(--ours); } .exact { --c: var(--exact); } .cublas { --c: var(--cublas); }
.pr { --c: var(--pr); } .main { --c: var(--main); } path.series { stroke: var(--c); stroke-width: 1.8; }
path.mark { fill: var(--c); } .exact path.series { stroke-dasharray: 6 3; }
"""
MARKS = {
    "ours": "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "exact": "m-2.6-2.6h5.2v5.2h-5.2z",
    "cublas": "m0-3.6l3.4 5.8h-6.8z",
    "pr": "m0-4l3.6 4l-3.6 4l-3.6-4z",
    "main": "m0 4l3.6-6h-7.2z",
}
BITS = {"bf16": 7.0, "exact": 6.5625}
NAMES = {
    "ours": "q6k, bf16 scales",
    "exact": "q6k, exact scales",
    "cublas": "cuBLAS bf16",
    "pr": "ExecuTorch PR 20229",
    "main": "ExecuTorch main",
}
PEER_KEYS = {"pr": ("ET PR", BITS["bf16"]), "main": ("ET main", BITS["exact"])}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot: where it stands, and how its values become places."""

    left: float
    top: float
    width: float
    height: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    log_y: bool

    def x(self, value: float) -> float:
        """M to the right, by powers of two."""
        return self._place(math.log2(value), [math.log2(t) for t in self.x_ticks], self.left, self.width)

    def y(self, value: float) -> float:
        """Values upwards; the lowest tick is the floor."""
        scale: Callable[[float], float] = math.log10 if self.log_y else float
        value = max(value, self.y_ticks[0]) if self.log_y else value
        return self._place(scale(value), [scale(t) for t in self.y_ticks], self.top + self.height, -self.height)

    @staticmethod
    def _place(value: float, ticks: list[float], start: float, span: float) -> float:
        return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * span

    def axes(self, title: str, *, labels: bool) -> Iterable[str]:
        """Grid, ticks and title; numbers of the y axis where `labels` says so."""
        right, bottom = self.left + self.width, self.top + self.height
        yield _text(self.left + self.width / 2, self.top - 7, title, "title")
        for tick in self.y_ticks:
            yield f'<path class="grid" d="M{_n(self.left)} {_n(self.y(tick))}H{_n(right)}"/>'
            if labels:
                yield _text(self.left - 6, self.y(tick) + 4, f"{tick:g}", "end")
        for tick in self.x_ticks:
            yield f'<path class="grid" d="M{_n(self.x(tick))} {_n(bottom)}v4"/>'
            yield _text(self.x(tick), bottom + 16, f"{tick:g}")

    def series(self, name: str, points: Points, *, joined: bool = True) -> Iterable[str]:
        """Marks at points, joined by a line."""
        places = [f"{_n(self.x(x))} {_n(self.y(y))}" for x, y in sorted(points)]
        line = f'<path class="series" d="M{"L".join(places)}"/>' if joined and len(places) > 1 else ""
        marks = "".join(f'<path class="mark" d="M{place}{MARKS[name]}"/>' for place in places)
        yield f'<g class="{name}">{line}{marks}</g>'

    def roof(self, points: Points, kind: str = "") -> str:
        """A bound."""
        places = "L".join(f"{_n(self.x(x))} {_n(self.y(y))}" for x, y in points)
        return f'<path class="roof {kind}" d="M{places}"/>'


def figure(report: Row, peers: Row) -> str:
    """The SVG.

    Args:
        report: what bench_kernels.py wrote.
        peers: `peer_figures.json`; its times are drawn if it is of the same GPU.
    """
    same = report["machine"]["gpu"] == peers["machine"]["gpu"]
    figures = peers["linear"] if same else []
    shapes = [s for s in SHAPES if any(_is(row, s) for row in report["linear"])]
    batched = [s for s in shapes if s in BATCHED and any(_is(r, s) and r["m"] > 8 for r in report["linear"])]
    parts, bottom = _block(shapes, 4, 22.0, lambda at: _bandwidth(report, figures, *at), "decode")
    more, bottom = _block(batched, 3, bottom, lambda at: _roofline(report, figures, *at), "all")
    height = math.ceil(bottom + 40)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img"><title>Speed of Q6_K linear layers on one {_safe(report["machine"]["gpu"])}'
        f"</title><style>{STYLE}</style>{''.join([*parts, *more, *_legend(bottom + 14, shown=same)])}</svg>\n"
    )


HEADS = {
    "decode": "GB/s of packed weights over M, rows of activations (line: read bandwidth)",
    "all": "TFLOP/s over M (lines: read bandwidth and matrix rate, at packed bytes; dotted: at 16 bits a weight)",
}


def _block(
    shapes: list[Shape],
    columns: int,
    top: float,
    draw: Callable[[tuple[Shape, float, float, float, bool]], Iterable[str]],
    kind: str,
) -> tuple[list[str], float]:
    """Panels in rows under a heading; and where they end."""
    if not shapes:
        return [], top
    parts = [_text(4, top, HEADS[kind], "head start")]
    width, height = (WIDTH - 48) / columns, 190 if kind == "decode" else 250
    for index, shape in enumerate(shapes):
        row, column = divmod(index, columns)
        parts += draw((shape, 44 + column * width, top + 36 + row * height, width - 30, column == 0))
    return parts, top + 30 + math.ceil(len(shapes) / columns) * height


def _bandwidth(
    report: Row, peers: list[Row], shape: Shape, left: float, top: float, width: float, labels: bool
) -> Iterable[str]:
    read = report["ceilings"]["read_gb_per_s"]
    most = math.ceil(read / 1000) * 1000
    step = 1000 if most <= 6000 else most // 5
    panel = Panel(left, top, width, 130, (1, 2, 4, 8), range(0, most + 1, step), False)
    yield from panel.axes(_name(shape), labels=labels)
    yield panel.roof([(1, read), (8, read)])
    weights = shape[0] * shape[1]
    for name, (peer, bits) in PEER_KEYS.items():
        rows = [p for p in peers if _is(p, shape) and p["peer"] == peer]
        yield from panel.series(name, [(p["m"], weights * bits / 8 / p["us"] / 1e3) for p in rows], joined=False)
    for name, rows in _ours(report, shape):
        yield from panel.series(name, [(r["m"], r["gb_per_s"]) for r in rows if r["m"] <= 8])


def _roofline(
    report: Row, peers: list[Row], shape: Shape, left: float, top: float, width: float, labels: bool
) -> Iterable[str]:
    read, rate = report["ceilings"]["read_gb_per_s"], report["ceilings"].get("matmul_8192_tflops")
    panel = Panel(left, top, width, 190, (1, 4, 16, 64, 256, 1024, 4096), (1, 10, 100, 1000), True)
    yield from panel.axes(_name(shape), labels=labels)
    for bits, kind in ((BITS["bf16"], ""), (16.0, "dense")):
        slope = 2 * 8 / bits * read / 1e3  # TFLOP/s for one row
        if rate is not None:  # measured last: an interrupted run has none
            yield panel.roof([(1, slope), (rate / slope, rate), (4096, rate)], kind)
    flops = 2 * shape[0] * shape[1] / 1e6
    for name, (peer, _) in PEER_KEYS.items():
        rows = [p for p in peers if _is(p, shape) and p["peer"] == peer]
        yield from panel.series(name, [(p["m"], p["m"] * flops / p["us"]) for p in rows], joined=False)
    measured = {r["m"]: r["m"] * flops / r["cublas_us"] for r in report["linear"] if _is(r, shape)}
    yield from panel.series("cublas", list(measured.items()))
    for name, rows in _ours(report, shape):
        yield from panel.series(name, [(r["m"], r["tflops"]) for r in rows])


def _legend(top: float, *, shown: bool) -> Iterable[str]:
    left = 44.0
    for name, words in NAMES.items():
        if name in PEER_KEYS and not shown:
            continue
        line = f'<path class="series" d="M{_n(left)} {_n(top)}h22"/>' if name not in PEER_KEYS else ""
        yield f'<g class="{name}">{line}<path class="mark" d="M{_n(left + 11)} {_n(top)}{MARKS[name]}"/></g>'
        yield _text(left + 28, top + 4, words, "start")
        left += 46 + 6.9 * len(words)


def _ours(report: Row, shape: Shape) -> Iterable[tuple[str, list[Row]]]:
    for name, scales in (("exact", "exact"), ("ours", "bf16")):
        rows = [r for r in report["linear"] if _is(r, shape) and r["scales"] == scales and "us" in r]
        if rows:
            yield name, rows


def _is(row: Row, shape: Shape) -> bool:
    return (row["n"], row["k"]) == shape


def _name(shape: Shape) -> str:
    return f"{shape[0]} × {shape[1]}"


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}"{f""" class="{kind}" """.rstrip() if kind else ""}>{_safe(words)}</text>'


def _safe(words: str) -> str:
    return html.escape(words)


def _n(value: float) -> str:
    """A coordinate to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
