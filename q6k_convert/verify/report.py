"""Write the results of `verify` as one HTML page that needs no script, no font and no network."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from q6k_convert import text
from q6k_convert.verify.plot import CSS, Depth, Point, Scale, legend, plot, safe

Row = dict[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_MOST_PANELS = 8
_NONE = "–"
_SNR = "signal to noise, higher is better"
_ERROR = "error in tolerances, at most 1 passes"
_STATES = {"passed": "✓", "failed": "✗", "skipped": "–"}
_STAGES = {
    "structure": "files, sizes and offsets",
    "content": "checksums of all stored bytes",
    "source": "stored arrays against the GGUF",
    "device": "results of the packed tensors",
}


def html_report(report: Row) -> str:
    """Return the page for the document that `verify --json` prints. The same document gives the same page."""
    depth = Depth((t["name"], math.prod(t["shape"])) for t in report["tensors"])
    title = f"{'Verified' if _verified(report) else 'Failed'}: {report['bundle']}"
    sections = (
        _head(report),
        _findings(report["findings"]),
        _stages(report["stages"]),
        _error(report, depth),
        _device(report, depth),
        _types(report["types"]),
        _tensors(report["tensors"]),
        _provenance(report),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{safe(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "".join(filter(None, sections))
        + "</main>\n</body>\n</html>\n"
    )


def _head(report: Row) -> str:
    """Return the header: the verdict, the stages behind it, and a few totals."""
    good = _verified(report)
    by_state = {state: [s["stage"] for s in report["stages"] if s["state"] == state] for state in _STATES}
    said = [
        f"{word}: {', '.join(by_state[state])}."
        for state, word in (("failed", "Failed"), ("passed", "Passed"), ("skipped", "Not checked"))
        if by_state[state]
    ]
    if report["findings"]:
        said.insert(0, f"{text.plural(len(report['findings']), 'finding')}.")
    tiles = [("tensors", f"{len(report['tensors']):,}"), ("stored", text.size(report["bytes"]))]
    tiles.append(("bits per weight", _number(report["bits_per_weight"], "g")))
    if (totals := report["source_totals"]) is not None:
        tiles.append(
            ("arrays as the source gives", "all" if totals["equal"] else '<span class="bad">not all</span>')
        )
        tiles.append(("signal to noise of weights that are not exact; higher is better", _snr(totals)))
    if report["nonfinite_scales"] is not None:
        tiles.append(("scales that are NaN or infinite", f"{report['nonfinite_scales']:,}"))
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return (
        f'<header class="{"good" if good else "bad"}">\n<p class="kind">Bundle verification</p>\n'
        f'<h1><span class="mark" aria-hidden="true">{"✓" if good else "✗"}</span> '
        f"{'Verified' if good else 'Failed'}</h1>\n"
        f'<p class="bundle">{safe(report["bundle"])}</p>\n<p>{safe(" ".join(said))}</p>\n</header>\n'
        f'<dl class="tiles">{shown}</dl>\n'
    )


def _findings(findings: list[Row]) -> str:
    if not findings:
        return ""
    fields = ("stage", "problem", "tensor", "array", "file")
    rows = [[_text(f[field]) for field in fields] for f in findings]
    return _section("Findings", _table(fields, rows), kind="bad")


def _stages(stages: list[Row]) -> str:
    rows = [
        [
            f"{safe(s['stage'])}<small>{_STAGES.get(s['stage'], '')}</small>",
            f'<span class="badge {safe(s["state"])}">{_STATES.get(s["state"], "")} {safe(s["state"])}</span>',
            _text(s["detail"]),
            text.size(s["bytes"]) if s["bytes"] and s["state"] != "skipped" else _NONE,
        ]
        for s in stages
    ]
    return _section("What was checked", _table(("stage", "state", "detail", "bytes read>"), rows))


def _error(report: Row, depth: Depth) -> str:
    """Return the section on the weights' error: a plot over depth, and its content in words."""
    tensors = report["tensors"]
    compared = [(n, t, t["source"]) for n, t in enumerate(tensors) if t["source"] is not None]
    if not compared:
        why = "The weights were not compared with the GGUF that the bundle was made from."
        return _section("Error of the weights", f"<p>{why}</p>\n") if tensors else ""
    points = [
        Point(n, None if s["exact"] else s["snr_db"], _snr(s), t["findings"] > 0)
        for n, t, s in compared
        if s["exact"] or _finite(s["snr_db"])
    ]
    exact = sum(p.value is None for p in points)
    said = [f"{exact:,} of {len(compared):,} compared {'tensor' if len(compared) == 1 else 'tensors'} exact"]
    if worst := min(((p.value, p.tensor) for p in points if p.value is not None), default=None):
        said.append(f"lowest {worst[0]:.2f} dB in {tensors[worst[1]]['name']}")
    if undefined := len(compared) - len(points):
        said.append(f"{undefined:,} without a defined ratio, not plotted")
    if left := len(tensors) - len(compared):
        said.append(f"{left:,} not compared, not plotted")
    note = (
        "Signal-to-noise ratio of the dequantised weights against those of the GGUF: higher is better, "
        "“exact” is no difference at all."
    )
    body = f"<p>{note}</p>\n<p>{safe('; '.join(said))}.</p>\n"
    if points:
        scale = Scale("Error of each tensor over the model's depth", "signal to noise in dB", from_zero=False)
        body += f'<figure><div class="wide">{plot(depth, scale, points)}</div>{legend(depth, points)}</figure>\n'
    return _section("Error of the weights", body)


def _device(report: Row, depth: Depth) -> str:
    """Return the section on device runs: totals for each setting, failed runs, bandwidth over depth."""
    runs = [(n, t, run) for n, t in enumerate(report["tensors"]) for run in t["device"] or ()]
    if not runs:
        return ""
    settings = sorted({(run["activations"], run["m"]) for _, _, run in runs})
    rows, panels = [], list[tuple[str, list[Point]]]()
    for activations, m in settings:
        own = [(n, t, run) for n, t, run in runs if (run["activations"], run["m"]) == (activations, m)]
        points = [
            Point(n, run["gb_per_s"], f"{_rate(run['gb_per_s'])} GB/s", not run["passed"])
            for n, _, run in own
            if _finite(run["gb_per_s"])
        ]
        rates = [p.value for p in points if p.value is not None]
        spread = [_rate(f(rates)) if rates else _NONE for f in (min, statistics.median, max)]
        worst = _number(_worst(run for _, _, run in own), ".3g")
        passed = f"{sum(run['passed'] for _, _, run in own):,} of {len(own):,}"
        rows.append([safe(activations), f"{m:,}", passed, worst, *spread])
        if points:
            panels.append((f"{activations} activations, m = {m:,}", points))
    columns = ("activations", "m>", "runs passed>", f"worst {_ERROR}>")
    body = _table((*columns, "lowest GB/s>", "median GB/s>", "highest GB/s>"), rows)
    if failed := [
        [_text(t["name"]), safe(run["activations"]), f"{run['m']:,}", _error_of(run), _text(run["first_bad"])]
        for _, t, run in runs
        if not run["passed"]
    ]:
        body += "<h3>Runs that failed</h3>\n"
        body += _table(("tensor", "activations", "m>", f"{_ERROR}>", "first bad value"), failed)
    if panels:
        note = "Packed bytes by the time spent multiplying with m rows of activations: higher is faster."
        body += f"<h3>Bandwidth per tensor</h3>\n<p>{note}</p>\n"
        body += legend(depth, (p for _, points in panels for p in points))
        most = max(p.value or 0.0 for _, points in panels for p in points)
        for name, points in panels[:_MOST_PANELS]:
            scale = Scale(f"Bandwidth of each tensor, {name}", "GB/s", from_zero=True, height=230)
            figure = f'<div class="wide">{plot(depth, scale, points, most)}</div>'
            body += f"<figure><figcaption>{safe(name)}</figcaption>{figure}</figure>\n"
        if more := len(panels) - _MOST_PANELS:
            body += f"<p>{text.plural(more, 'more setting')} not plotted.</p>\n" if more > 0 else ""
    return _section("Results on the device", body)


def _types(types: list[Row]) -> str:
    """Return the section on sizes by type, as numbers and bars; sizes in the GGUF where they are known."""
    if not types:
        return ""
    sides = [("in", "bytes_in", "in the GGUF")] if any(row["bytes_in"] for row in types) else []
    sides.append(("out", "bytes_out", "in the bundle"))
    most = max(1, *(row[key] for row in types for _, key, _ in sides))
    rows = []
    for row in types:
        told = ", ".join(f"{text.size(row[key])} {where}" for _, key, where in sides)
        bars = "".join(
            f'<rect class="{side}" x="0" y="{1 + 10 * k}" width="{_bar(row[key], most):.1f}" height="8" rx="1.5"/>'
            for k, (side, key, _) in enumerate(sides)
        )
        bar = f'<svg class="bar" role="img" viewBox="0 0 180 {10 * len(sides)}">'
        bar += f"<title>{safe(row['type'])}: {told}</title>{bars}</svg>"
        sizes = [text.size(row[key]) for _, key, _ in sides]
        counts = [f"{row['tensors']:,}", f"{row['weights']:,}"]
        facts = [_number(row["bits_per_weight"], "g"), _snr(row["source"]) if row["source"] else _NONE]
        rows.append([_text(row["type"]), _text(_stored(row)), *counts, *facts, *sizes, bar])
    columns = ("type", "stored as", "tensors>", "weights>", "bits per weight>", f"{_SNR}>")
    names = (*columns, *(f"{where}>" for _, _, where in sides))
    key_to_bars = ", ".join(f'<span class="{side}">■</span> {where}' for side, _, where in sides)
    return _section("Sizes by type", _table(names, rows, last=key_to_bars))


def _tensors(tensors: list[Row]) -> str:
    """Return the table of all tensors, worst first, without columns for stages that did not run."""
    if not tensors:
        return ""
    sourced = any(t["source"] is not None for t in tensors)
    run = any(t["device"] for t in tensors)
    columns = ["tensor", "type", "shape>", "stored as", "bytes>", "bits per weight>", "findings>"]
    columns += ["as the source gives", f"{_SNR}>", "largest scale error, lower is better>"] if sourced else []
    columns += [f"{_ERROR}>", "best GB/s>"] if run else []
    rows = []
    ordered = sorted(tensors, key=_badness)
    for t in ordered:
        row = [_text(t["name"]), _text(t["type"]), text.shape(t["shape"]), _text(_stored(t))]
        row += [text.size(t["bytes"]), _number(t["bits_per_weight"], "g"), f"{t['findings']:,}"]
        if sourced:
            s = t["source"] or {"equal": None, "exact": False, "snr_db": None, "max_scale_error": None}
            equal = {True: "yes", False: '<strong class="bad">no</strong>', None: _NONE}[s["equal"]]
            row += [equal, _snr(s), _number(s["max_scale_error"], ".3g")]
        if run:
            rates = [r["gb_per_s"] for r in t["device"] or () if _finite(r["gb_per_s"])]
            row += [_number(_worst(t["device"] or ()), ".3g"), _rate(max(rates, default=None))]
        rows.append(row)
    bad = [t["findings"] > 0 for t in ordered]
    return _section("All tensors, worst first", _table(columns, rows, bad), kind="tensors")


def _provenance(report: Row) -> str:
    """Return the section on the bundle's producer, options and sources."""
    facts = [("producer", report["producer"]), ("architecture", report["architecture"])]
    facts += [(f"option {k}", v if isinstance(v, str) else json.dumps(v)) for k, v in report["options"].items()]
    facts.append(("exit code", report["exit_code"]))
    shown = "".join(f"<div><dt>{safe(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    body = f'<dl class="facts">{shown}</dl>\n'
    if report["sources"]:
        rows = [[_text(s["name"]), text.size(s["bytes"]), _text(s["checksum"])] for s in report["sources"]]
        body += _table(("made from", "bytes>", "checksum"), rows)
    return _section("Origin", body)


def _badness(tensor: Row) -> tuple[Any, ...]:
    """Return a sort key: findings, failed runs, undefined ratio, lowest ratio; untested and exact tensors last."""
    source, runs = tensor["source"], tensor["device"] or ()
    snr = source["snr_db"] if source is not None else None
    rank = 2 if source is None else 3 if source["exact"] else 1 if _finite(snr) else 0
    worst = _worst(runs)
    return (
        -tensor["findings"],
        all(run["passed"] for run in runs),
        source is None or source["equal"],
        rank,
        snr if rank == 1 else 0.0,
        0.0 if worst is None else -worst,
    )


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}">\n<h2>{title}</h2>\n{body}</section>\n'


def _table(columns: Sequence[str], rows: list[list[str]], bad: Sequence[bool] = (), last: str = "") -> str:
    """Return a table of HTML cells. A column `…>` holds numbers; the first column names the row.

    Each cell has its column's name, which a narrow screen shows in place of the head.
    """
    right = [name.endswith(">") for name in columns] + [False]
    kinds = [' class="number"' if r else "" for r in right]
    heads = [*(name.rstrip(">") for name in columns), *([last] if last else [])]
    parts = ['<div class="wide"><table>\n<thead><tr>']
    parts += [f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(heads, kinds, strict=False)]
    parts.append("</tr></thead>\n<tbody>\n")
    for n, row in enumerate(rows):
        parts.append('<tr class="bad">' if n < len(bad) and bad[n] else "<tr>")
        parts.append(f'<th scope="row">{row[0]}</th>')
        parts += [
            f'<td{kind} data-name="{re.sub("<[^>]*>", "", name)}">{cell}</td>'
            for cell, kind, name in zip(row[1:], kinds[1:], heads[1:], strict=False)
        ]
        parts.append("</tr>\n")
    return "".join(parts) + "</tbody>\n</table></div>\n"


def _bar(size: int, most: int) -> float:
    """Return the length of a bar in pixels; at least 1 if the size is not zero."""
    return max(1.0, 180 * size / most) if size else 0.0


def _stored(row: Row) -> str:
    """Return the storage of a tensor or a type, and its weight type if it is packed."""
    return f"{row['storage']}, {row['format']}" if row["format"] else row["storage"]


def _verified(report: Row) -> bool:
    return bool(report["status"] == "verified")


def _text(value: object) -> str:
    return _NONE if value is None or value == "" else safe(value)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, form: str) -> str:
    if value is None:
        return _NONE
    return format(value, form) if math.isfinite(value) else "not finite"


def _rate(value: float | None) -> str:
    """Return GB/s as text, with more digits for the slow reference."""
    return _number(value, ",.1f" if value is None or value >= 10 else ".3g")


def _snr(source: Row) -> str:
    if source["exact"]:
        return "exact"
    return f"{source['snr_db']:.2f} dB" if _finite(source["snr_db"]) else _NONE


def _worst(runs: Iterable[Row]) -> float | None:
    """Return the largest error of some runs; NaN counts as infinity."""
    errors = [run["worst_error_in_tolerances"] for run in runs]
    known = [math.inf if math.isnan(error) else error for error in errors if error is not None]
    return max(known, default=None)


def _error_of(run: Row) -> str:
    return _number(run["worst_error_in_tolerances"], ".3g")
