"""Verification documents for the HTML report, and a reader of its pages."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

from q6k_convert.verify.report import html_report

Row = dict[str, Any]

HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>&amp;"
ROLES = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def tensor(name: str, source: Row | None = None, device: list[Row] | None = None, **changes: Any) -> Row:
    row = {"name": name, "type": "Q6_K", "shape": [256, 512], "storage": "planar", "format": "q6_k_exact"}
    row |= {"bytes": 107520, "findings": 0, "nonfinite_scales": 0, "bits_per_weight": 6.5625}
    return {**row, "source": source, "device": device, **changes}


def compared(snr: float | None = None, *, exact: bool = False, equal: bool = True) -> Row:
    error = None if exact else 0.00195
    return {"equal": equal, "exact": exact, "snr_db": snr, "max_scale_error": error, "nonfinite_scales": 0}


def run(rate: float | None, *, m: int = 1, activations: str = "int8", passed: bool = True) -> Row:
    row = {
        "m": m,
        "activations": activations,
        "worst_error_in_tolerances": 0.5 if passed else 31.0,
        "passed": passed,
    }
    bad = None if passed else "row 17, column 3: 1.25 instead of 1.19"
    return {**row, "seconds": 0.01, "gb_per_s": rate, "first_bad": bad}


def document(tensors: list[Row], **changes: Any) -> Row:
    stages = [
        {"stage": "structure", "state": "passed", "detail": "2 files", "seconds": 0.1, "bytes": 0},
        {"stage": "content", "state": "passed", "detail": "xxh3-128 of 2 files", "seconds": 1.2, "bytes": 5000000},
        {"stage": "source", "state": "passed", "detail": "all compared", "seconds": 3.4, "bytes": 4000000},
        {"stage": "device", "state": "skipped", "detail": "no GPU here", "seconds": 0.0, "bytes": 9},
    ]
    types: list[Row] = [
        {"type": "Q6_K", "storage": "planar", "format": "q6_k_exact", "tensors": 9, "weights": 10**6},
        {"type": "Q2_K", "storage": "dequantized", "format": None, "tensors": 4, "weights": 9},
    ]
    types[0] |= {"bytes_in": 820000, "bytes_out": 820000, "bits_per_weight": 6.5625, "source": compared(53.2)}
    types[1] |= {"bytes_in": 5, "bytes_out": 2000000, "bits_per_weight": 16, "source": None}
    whole = {
        "status": "verified",
        "exit_code": 0,
        "bundle": "/models/tiny-planar",
        "producer": "q6k-convert 1.0.0",
        "architecture": "llama",
        "options": {"other_types": "bf16", "shard_size": 5000000000, "tied": None},
        "sources": [{"name": "tiny.gguf", "bytes": 4000000, "checksum": "xxh3-128:00ff"}],
        "types": types,
        "bytes": 5000000,
        "bits_per_weight": 6.5625,
        "stages": stages,
        "findings": [],
        "tensors": tensors,
        "nonfinite_scales": 3,
        "source_totals": {
            "equal": True,
            "exact": False,
            "snr_db": 53.214,
            "max_scale_error": 0.00195,
            "nonfinite_scales": 3,
        },
    }
    return copy.deepcopy({**whole, **changes})


def model(blocks: int = 4) -> Row:
    """Return the document of a usual model: exact norms, matrix errors that grow by layer, timed planar ones."""
    tensors = [tensor("token_embd.weight", compared(58.0), [run(2700.0), run(None, m=8)])]
    for block in range(blocks):
        for place, role in enumerate(ROLES):
            name = f"blk.{block}.{role}.weight"
            if role.endswith("_norm"):
                norm: Row = {"type": "F32", "shape": [256], "storage": "plain", "bits_per_weight": 32.0}
                tensors.append(tensor(name, compared(exact=True), **norm))
            else:
                device = [run(1000.0 + block), run(900.0, activations="bf16")]
                tensors.append(tensor(name, compared(60.0 - place - block / 4), device))
    return document([*tensors, tensor("output.weight", compared(57.0), [run(2800.0)])])


def failed() -> Row:
    report = model()
    name = "blk.1.ffn_up.weight"
    bad = next(t for t in report["tensors"] if t["name"] == name)
    bad.update(source=compared(31.5, equal=False), findings=1, device=[run(950.0, passed=False)])
    report["findings"] = [
        {
            "stage": "source",
            "file": "model.safetensors",
            "tensor": name,
            "array": f"{name}.ql",
            "problem": "17 bytes",
        },
        {"stage": "content", "file": HOSTILE, "tensor": None, "array": None, "problem": "another checksum"},
    ]
    report["stages"][2]["state"] = "failed"
    report["source_totals"]["equal"] = False
    return {**report, "status": "failed", "exit_code": 5}


def unreadable() -> Row:
    """Return the document of a bundle whose manifest cannot be read."""
    none: Row = {"types": [], "sources": [], "options": {}, "producer": "", "architecture": ""}
    finding = {
        "stage": "structure",
        "file": "manifest.json",
        "tensor": None,
        "array": None,
        "problem": "is not JSON",
    }
    none |= {
        "bytes": 0,
        "bits_per_weight": None,
        "nonfinite_scales": None,
        "source_totals": None,
        "findings": [finding],
    }
    report = document([], **none, status="failed", exit_code=5)
    for stage in report["stages"]:
        stage["state"] = "failed" if stage["stage"] == "structure" else "skipped"
    return report


VARIANTS = {
    "model": model(),
    "failed": failed(),
    "unreadable": unreadable(),
    "one exact tensor": document([tensor("output.weight", compared(exact=True))]),
    "one tensor": document([tensor("blk.0.ffn_up.weight", compared(50.0), [run(1000.0)])]),
    "no source": document([tensor(f"blk.{n}.attn_q.weight") for n in range(3)], source_totals=None),
    "thousand": model(blocks=111),
    "no blocks": document([tensor(f"conv{n}.weight", compared(40.0 + n)) for n in range(30)]),
    "no values": document(
        [
            tensor("blk.0.a", compared(None), [run(None), run(math.nan)], bits_per_weight=None, shape=[]),
            tensor("blk.999999.b", compared(math.nan), [], storage="skipped", bytes=0),
            tensor("c", compared(math.inf), [{**run(1.0), "worst_error_in_tolerances": math.nan}]),
        ],
        bits_per_weight=None,
        source_totals=compared(None),
    ),
}


class Page(HTMLParser):
    """Parser of the elements of a page; it fails where tags do not balance."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[Row] = []
        self.elements: list[Row] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.stack, f"never closed: {[e['tag'] for e in self.stack]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element: Row = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self.stack]}
        element["parent"] = self.stack[-1] if self.stack else None
        self.elements.append(element)
        if tag != "meta":
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1]["tag"] != "style":
            self.text += data
        for element in self.stack:
            element["text"] += data

    def all(self, tag: str, cls: str = "") -> list[Row]:
        found = [e for e in self.elements if e["tag"] == tag]
        return [e for e in found if not cls or cls in (e["attrs"].get("class") or "").split()]

    def tooltips(self) -> list[str]:
        return [e["text"] for e in self.all("title") if e["inside"][-1] == "path"]

    def rows(self, heading: str) -> list[list[str]]:
        """Return the text of the body rows of the first table under an h2."""
        order = [e for e in self.elements if e["tag"] in ("h2", "tr", "td", "th", "table")]
        start = next(n for n, e in enumerate(order) if e["tag"] == "h2" and e["text"] == heading)
        rows: list[list[str]] = []
        tables = 0
        for e in order[start + 1 :]:
            tables += e["tag"] == "table"
            if e["tag"] == "h2" or tables > 1:
                break
            if e["tag"] == "tr":
                rows.append([])
            elif e["tag"] in ("td", "th"):
                rows[-1].append(e["text"])
        return rows[1:]


def page(report: Row) -> Page:
    return Page(html_report(report))


def places(shown: Page) -> dict[str, tuple[float, float]]:
    """Return the position of each point of a page by its tensor's name, in the first plot that has it."""
    found: dict[str, tuple[float, float]] = {}
    for e in shown.all("title"):
        if e["inside"][-1] == "path":
            at = re.match(r"M(-?[\d.]+) (-?[\d.]+)m", e["parent"]["attrs"]["d"])
            assert at is not None
            found.setdefault(e["text"].rsplit(": ", 1)[0], (float(at[1]), float(at[2])))
    return found


def axis(shown: Page, which: str) -> dict[float, float]:
    """Return the numbers at an axis of the first plot, and their positions."""
    plot = shown.all("svg", "plot")[0]
    texts = [e for e in shown.all("text", "tick") if e["parent"] is plot]
    labels = [e for e in texts if ("end" in e["attrs"]["class"]) == (which == "y")]
    below = 4.0 if which == "y" else 0.0  # a label's baseline is that much below its line
    return {float(e["text"]): float(e["attrs"][which]) - below for e in labels if not e["text"].isalpha()}
