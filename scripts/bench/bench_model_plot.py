#!/usr/bin/env python3
"""Draw tokens a second of whole models beside llama.cpp as one SVG, from the reports of bench_model.py.

    python scripts/bench/bench_model_plot.py [--results DIR] [--plot FILE.svg]

It reads `bench_model.json` and `bench_model_SHAPE_MIX.json`, and llama.cpp's figures in `peer_figures.json`; it
measures nothing. The same figures give the same bytes. What was not measured is said to be so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from bench_model_rows import Row

RESULTS = Path(__file__).parents[2] / "kernels" / "results"
PEER_FIGURES = Path(__file__).with_name("peer_figures.json")
MODELS = {
    ("llama-8b", "q4_k_m"): ("Llama 3.1 8B, Q4_K_M", "bench_model_llama-8b_q4_k_m.json"),
    ("llama-8b", "q6_k"): ("Llama 3.1 8B, Q6_K", "bench_model.json"),
    ("gemma-27b", "q4_k_m"): ("Gemma 3 27B, Q4_K_M", "bench_model_gemma-27b_q4_k_m.json"),
    ("gemma-27b", "q6_k"): ("Gemma 3 27B, Q6_K", "bench_model_gemma-27b_q6_k.json"),
}
"""Shape and mix -> words, and the name of the report."""


class Panel(NamedTuple):
    """What a panel shows: the rows of one kind with so many tokens before them, or in them."""

    words: str
    what: str
    key: str
    tokens: int


PANELS = (
    Panel("decode after 2043 tokens", "decode", "context", 2043),
    Panel("prompt of 2048 tokens", "prefill", "tokens", 2048),
)
OURS, PEER = "q6k_kernels", "llama.cpp"
COLORS = {OURS: "#0969da", PEER: "#8c959f"}
LABELS, BARS, VALUES = 165, 185, 120
"""Widths of a panel's three columns."""
TOP, GROUP, BAR, FOOT = 84, 48, 16, 12
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
font-family="system-ui, sans-serif" font-size="12" fill="#1f2328" role="img">
<title>{title}</title>
<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>
<text x="16" y="26" font-size="15" font-weight="600">{title}</text>"""
"""The beginning: an opaque background, so that it looks the same on dark and light pages."""


def figures(results: Path, peers: Row) -> dict[tuple[str, str, str], dict[str, float | None]]:
    """Return the tokens a second of each model and panel, ours and the peer's; None for what was not measured.

    Args:
        results: directory of the reports.
        peers: content of `peer_figures.json`.

    Raises:
        SystemExit: a report is of another model or GPU than its name and the picture say.
    """
    found = dict[tuple[str, str, str], dict[str, float | None]]()
    for (shape, mix), (_, name) in MODELS.items():
        path = results / name
        rows: list[Row] = []
        if path.exists():
            report: Row = json.loads(path.read_text(encoding="utf-8"))
            is_of = report["shape"]["name"], report["mix"], report["machine"].get("gpu")
            if is_of != (wanted := (shape, mix, peers["machine"]["gpu"])):
                sys.exit(f"bench_model_plot: {path}: expected a report of {wanted}, found one of {is_of}")
            rows = report["rows"]
        theirs = [
            row for row in peers["whole_model"] if (row["peer"], row["shape"], row["mix"]) == (PEER, shape, mix)
        ]
        for panel in PANELS:
            found[shape, mix, panel.what] = {OURS: _rate(rows, panel), PEER: _rate(theirs, panel)}
    return found


def _rate(rows: list[Row], panel: Panel) -> float | None:
    of_panel = (row for row in rows if row["what"] == panel.what and row.get(panel.key) == panel.tokens)
    return next((float(row["tokens_per_s"]) for row in of_panel), None)


def svg(found: dict[tuple[str, str, str], dict[str, float | None]], gpu: str) -> str:
    """Return the picture: a panel for decoding and one for prompts, and in it two bars for each model."""
    panel_width = LABELS + BARS + VALUES
    size = {"width": 2 * panel_width, "height": TOP + GROUP * len(MODELS) + FOOT}
    parts = [HEAD.format(**size, title=f"Tokens a second on one {gpu}, random weights")]
    for at, (who, color) in enumerate(COLORS.items()):
        x = 2 * panel_width - 220 + 110 * at
        parts += [f'<rect x="{x}" y="17" width="10" height="10" fill="{color}"/>', _text(x + 16, 26, who)]
    for column, panel in enumerate(PANELS):
        left = column * panel_width
        parts.append(_text(left + LABELS, 66, panel.words, 'font-weight="600"'))
        rates = [
            rate for (_, _, what), both in found.items() if what == panel.what for rate in both.values() if rate
        ]
        for row, ((shape, mix), (words, _)) in enumerate(MODELS.items()):
            both, y = found[shape, mix, panel.what], TOP + GROUP * row
            parts.append(_text(left + LABELS - 8, y + BAR + 4, words, 'text-anchor="end"'))
            for which, (who, color) in enumerate(COLORS.items()):
                parts += _bar(left + LABELS, y + which * (BAR + 1), both, who, color, BARS / max(rates, default=1))
    return "\n".join([*parts, "</svg>\n"])


def _bar(x: int, y: int, both: dict[str, float | None], who: str, color: str, scale: float) -> list[str]:
    """Return one bar with its figure, ours with how many times the peer's it is."""
    rate, peer = both[who], both[PEER]
    if rate is None:
        return [_text(x + 4, y + 12, f"{who} was not measured", 'fill="#59636e" font-style="italic"')]
    width = rate * scale
    times = f" ({rate / peer:.1f}×)" if who == OURS and peer else ""
    words = f"{rate:,.0f}{times}" if rate >= 100 else f"{rate:.1f}{times}"
    bar = f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>'
    return [bar, _text(x + width + 5, y + 12, words)]


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{round(x, 1):g}" y="{y}"{" " if more else ""}{more}>{escape(words)}</text>'


def main(arguments: list[str] | None = None) -> None:
    """Parse the options and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--plot", type=Path, default=RESULTS / "bench_model.svg", metavar="FILE.svg")
    args: Any = parser.parse_args(arguments)
    peers: Row = json.loads(PEER_FIGURES.read_text(encoding="utf-8"))
    args.plot.write_text(svg(figures(args.results, peers), peers["machine"]["gpu"]), encoding="utf-8")


if __name__ == "__main__":
    main()
