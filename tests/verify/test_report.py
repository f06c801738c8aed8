"""The HTML report: what it says, that nothing in it can act, and how a browser shows it."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from q6k_convert.verify.plot import Depth, safe
from q6k_convert.verify.report import html_report

Row = dict[str, Any]

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>&amp;"
ROLES = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


# --- documents --------------------------------------------------------------------------------------------------


def tensor(name: str, source: Row | None = None, device: list[Row] | None = None, **changes: Any) -> Row:
    row = {"name": name, "type": "Q6_K", "shape": [256, 512], "storage": "planar", "bytes": 107520, "findings": 0}
    return {**row, "bits_per_weight": 6.5625, "source": source, "device": device, **changes}


def compared(snr: float | None = None, *, exact: bool = False, equal: bool = True) -> Row:
    return {"equal": equal, "exact": exact, "snr_db": snr, "max_scale_error": None if exact else 0.00195}


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
    types = [
        {
            "type": "Q6_K",
            "storage": "planar",
            "tensors": 9,
            "weights": 10**6,
            "bytes_in": 820000,
            "bytes_out": 820000,
        },
        {"type": "Q4_K", "storage": "dequantized", "tensors": 4, "weights": 9, "bytes_in": 5, "bytes_out": 2000000},
    ]
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
        "source_totals": {"equal": True, "exact": False, "snr_db": 53.214, "max_scale_error": 0.00195},
    }
    return copy.deepcopy({**whole, **changes})


def model(blocks: int = 4) -> Row:
    """A model of usual shape: norms exact, matrices with an error that grows by block, planar ones timed."""
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
    """What is left when the manifest cannot be read."""
    none: Row = {"types": [], "sources": [], "options": {}, "producer": "", "architecture": ""}
    finding = {
        "stage": "structure",
        "file": "manifest.json",
        "tensor": None,
        "array": None,
        "problem": "is not JSON",
    }
    none |= {"bytes": 0, "bits_per_weight": None, "source_totals": None, "findings": [finding]}
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


# --- reading a page ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, and a failure where tags do not balance."""

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
        """The text of the body rows of the first table under an h2."""
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
    """Where each point of a page stands, by its tooltip's tensor name (the first plot that has it)."""
    found: dict[str, tuple[float, float]] = {}
    for e in shown.all("title"):
        if e["inside"][-1] == "path":
            at = re.match(r"M(-?[\d.]+) (-?[\d.]+)m", e["parent"]["attrs"]["d"])
            assert at is not None
            found.setdefault(e["text"].rsplit(": ", 1)[0], (float(at[1]), float(at[2])))
    return found


def axis(shown: Page, which: str) -> dict[float, float]:
    """The numbers at an axis of the first plot, and where they stand."""
    plot = shown.all("svg", "plot")[0]
    texts = [e for e in shown.all("text", "tick") if e["parent"] is plot]
    labels = [e for e in texts if ("end" in e["attrs"]["class"]) == (which == "y")]
    below = 4.0 if which == "y" else 0.0  # a label's baseline is that much below its line
    return {float(e["text"]): float(e["attrs"][which]) - below for e in labels if not e["text"].isalpha()}


# --- the page as such -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_page_is_well_formed_and_needs_nothing_else(name: str) -> None:
    source = html_report(VARIANTS[name])
    shown = Page(source)
    lowered = source.lower()
    for word in ("http://", "https://", "url(", "@import", "javascript:", "<script", "<link", "<img", "<iframe"):
        assert word not in lowered
    assert not re.search(r"\b(nan|inf|none)\b", shown.text)
    for e in shown.elements:
        assert not [a for a in e["attrs"] if a.startswith("on") or a in ("src", "href", "style")]
    policy = next(e for e in shown.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy")
    assert policy["attrs"]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_page_can_be_used_without_sight(name: str) -> None:
    shown = page(VARIANTS[name])
    assert shown.all("html")[0]["attrs"]["lang"] == "en"
    assert len(shown.all("h1")) == 1
    assert shown.all("h2")
    assert [e["text"] for e in shown.all("title") if e["inside"] == ["html", "head"]] != [""]
    assert all(e["attrs"].get("scope") in ("col", "row") for e in shown.all("th"))
    for svg in shown.all("svg"):
        title = next((e for e in shown.all("title") if e["parent"] is svg), None)
        hidden = svg["attrs"].get("aria-hidden") == "true"
        assert hidden or (svg["attrs"].get("role") == "img" and title is not None and title["text"])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_document_gives_the_same_page_however_long_it_took(name: str) -> None:
    report = VARIANTS[name]
    before = copy.deepcopy(report)
    first = html_report(report)
    slower = json.loads(json.dumps(report))
    for timed in [*slower["stages"], *(r for t in slower["tensors"] for r in t["device"] or ())]:
        timed["seconds"] = 123.456
    assert html_report(slower) == first
    assert repr(report) == repr(before)


def test_the_page_does_not_depend_on_hash_seeds(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(failed()))
    code = (
        "import json,sys; from q6k_convert.verify.report import html_report; "
        "print(ascii(html_report(json.load(sys.stdin))))"
    )
    pages = []
    for seed in ("1", "2"):
        with (tmp_path / "report.json").open() as given:
            made = subprocess.run(
                [sys.executable, "-c", code],
                stdin=given,
                capture_output=True,
                check=True,
                env={**os.environ, "PYTHONHASHSEED": seed},
            )
        pages.append(made.stdout)
    assert pages[0] == pages[1]
    assert b"Failed" in pages[0]


def test_texts_of_the_bundle_stay_texts_wherever_they_stand() -> None:
    report = failed()
    report["tensors"].append(tensor(f"blk.0.{HOSTILE}", compared(20.0), [run(1.0, activations=HOSTILE)]))
    report["tensors"][-1].update(type=HOSTILE, storage=HOSTILE)
    for key in ("bundle", "producer", "architecture"):
        report[key] = HOSTILE
    report["options"] = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    report["sources"] = [{"name": HOSTILE, "bytes": 1, "checksum": HOSTILE}]
    report["types"][0].update(type=HOSTILE, storage=HOSTILE)
    report["stages"][0].update(stage=HOSTILE, state=HOSTILE, detail=HOSTILE)
    report["findings"] = [dict.fromkeys(("stage", "file", "tensor", "array", "problem"), HOSTILE)]
    source = html_report(report)
    shown = Page(source)
    assert {"script", "img"}.isdisjoint(e["tag"] for e in shown.elements)
    assert not [a for e in shown.elements for a in e["attrs"] if a.startswith("on") or a == "src"]
    assert shown.rows("Findings") == [[HOSTILE] * 5]
    assert shown.rows("Sizes by type")[0][:2] == [HOSTILE, HOSTILE]
    assert shown.all("p", "bundle")[0]["text"] == HOSTILE
    assert f"blk.0.{HOSTILE}: 20.00 dB" in shown.tooltips()


def test_what_does_not_print_is_spelled_out() -> None:
    assert safe("a\nb\x00\u202egpj\ud800é😀&") == "a\\nb\\x00\\u202egpj\\ud800é😀&amp;"
    assert html_report(document([tensor("\ud800\u2066x", compared(30.0))])).encode()


# --- what it says -----------------------------------------------------------------------------------------------


def test_a_verified_bundle() -> None:
    shown = page(model())
    assert shown.all("h1")[0]["text"] == "✓ Verified"
    assert "Passed: structure, content, source. Not checked: device." in shown.text
    assert "Findings" not in [e["text"] for e in shown.all("h2")]
    assert shown.all("header")[0]["attrs"]["class"] == "good"
    assert "53.21 dB" in shown.text
    checked = shown.rows("What was checked")
    assert [row[1] for row in checked] == ["✓ passed"] * 3 + ["– skipped"]
    assert checked[1][2:] == ["xxh3-128 of 2 files", "5.00 MB"]
    assert checked[3][2:] == ["no GPU here", "–"]


def test_a_failed_bundle_shows_its_findings_first() -> None:
    shown = page(failed())
    assert shown.all("h1")[0]["text"] == "✗ Failed"
    assert shown.all("header")[0]["attrs"]["class"] == "bad"
    assert "2 findings. Failed: source. Passed: structure, content. Not checked: device." in shown.text
    assert shown.all("h2")[0]["text"] == "Findings"
    name = "blk.1.ffn_up.weight"
    assert shown.rows("Findings") == [
        ["source", "17 bytes", name, f"{name}.ql", "model.safetensors"],
        ["content", "another checksum", "–", "–", HOSTILE],
    ]
    worst = shown.rows("All tensors, worst first")[0]
    assert worst[0] == name
    assert worst[6:] == ["1", "no", "31.50 dB", "0.00195", "31", "950.0"]
    assert "row 17, column 3: 1.25 instead of 1.19" in shown.text
    assert len(shown.all("path", "ring")) == 4  # in both plots and in both legends


def test_a_bundle_without_a_manifest() -> None:
    shown = page(unreadable())
    assert [e["text"] for e in shown.all("h2")] == ["Findings", "What was checked", "Origin"]
    assert not shown.all("svg")
    assert shown.rows("Findings")[0][:2] == ["structure", "is not JSON"]


def test_sizes_by_type_and_their_bars() -> None:
    shown = page(model())
    rows = shown.rows("Sizes by type")
    assert rows[0][:6] == ["Q6_K", "planar", "9", "1,000,000", "820.00 kB", "820.00 kB"]
    widths = [float(e["attrs"]["width"]) for e in shown.all("rect")]
    assert widths == [73.8, 73.8, 1.0, 180.0]  # to one scale, and 5 bytes can still be seen
    assert "Q4_K: 5 B in the GGUF, 2.00 MB in the bundle" in [e["text"] for e in shown.all("title")]


def test_sizes_in_the_gguf_are_left_out_where_they_are_not_known() -> None:
    report = model()
    for row in report["types"]:
        row["bytes_in"] = 0
    shown = page(report)
    assert shown.rows("Sizes by type")[0][:5] == ["Q6_K", "planar", "9", "1,000,000", "820.00 kB"]
    assert [float(e["attrs"]["width"]) for e in shown.all("rect")] == [73.8, 180.0]
    assert "in the GGUF" not in shown.text.split("Sizes by type")[1].split("All tensors")[0]


def test_where_it_came_from() -> None:
    shown = page(model())
    facts = dict(zip([e["text"] for e in shown.all("dt")], [e["text"] for e in shown.all("dd")], strict=True))
    assert facts["producer"] == "q6k-convert 1.0.0"
    assert facts["option other_types"] == "bf16"
    assert facts["option shard_size"] == "5000000000"
    assert facts["option tied"] == "null"
    assert facts["exit code"] == "0"
    assert shown.rows("Origin") == [["tiny.gguf", "4.00 MB", "xxh3-128:00ff"]]


def test_the_worst_tensor_comes_first() -> None:
    tensors = [
        tensor("exact", compared(exact=True)),
        tensor("untested"),
        tensor("high", compared(60.0)),
        tensor("low", compared(20.0)),
        tensor("undefined", compared(None)),
        tensor("unequal", compared(70.0, equal=False)),
        tensor("run failed", compared(exact=True), [run(1.0), run(None, passed=False)]),
        tensor("found", compared(exact=True), findings=1),
        tensor("found twice", findings=2),
    ]
    rows = page(document(tensors)).rows("All tensors, worst first")
    order = ["found twice", "found", "run failed", "unequal", "undefined", "low", "high", "untested", "exact"]
    assert [row[0] for row in rows] == order


def test_columns_of_what_was_not_checked_are_left_out() -> None:
    shown = page(VARIANTS["no source"])
    assert "The weights were not compared" in shown.text
    assert not shown.all("svg", "plot")
    assert {len(row) for row in shown.rows("All tensors, worst first")} == {7}


def test_values_that_are_missing_or_not_finite() -> None:
    shown = page(VARIANTS["no values"])
    rows = {row[0]: row[1:] for row in shown.rows("All tensors, worst first")}
    assert rows["blk.0.a"] == ["Q6_K", "scalar", "planar", "107.52 kB", "–", "0", "yes", "–", "0.00195", "0.5", "–"]
    assert rows["c"][-2:] == ["not finite", "1"]
    assert "0 of 3 compared tensors exact; 3 without a defined ratio, not plotted." in shown.text


# --- the plots --------------------------------------------------------------------------------------------------


def test_each_tensor_is_a_point_with_its_value() -> None:
    report = model()
    shown = page(report)
    tips = shown.tooltips()
    assert "blk.2.ffn_down.weight: 51.50 dB" in tips
    assert "blk.2.ffn_down.weight: 1,002.0 GB/s" in tips
    assert "blk.3.attn_norm.weight: exact" in tips
    assert sum(tip.endswith((" dB", ": exact")) for tip in tips) == len(report["tensors"]) == 38
    assert "8 of 38 compared tensors exact; lowest 51.25 dB in blk.3.ffn_down.weight." in shown.text
    titles = [e["text"] for e in shown.all("title")]
    assert "Error of each tensor over the model's depth" in titles
    assert "Bandwidth of each tensor, int8 activations, m = 1" in titles
    assert "Bandwidth of each tensor, int8 activations, m = 8" not in titles  # no bandwidth was measured
    labels = [e["text"] for e in shown.all("text", "axis")]
    assert labels[:2] == ["block (tensors outside the blocks at the ends)", "signal to noise in dB"]
    assert labels.count("GB/s") == 2


def test_points_stand_where_their_values_say() -> None:
    at = places(page(model()))
    x, y = ({name: place[k] for name, place in at.items()} for k in (0, 1))
    assert x["token_embd.weight"] < min(x[n] for n in x if n.startswith("blk."))
    assert x["output.weight"] > max(x[n] for n in x if n.startswith("blk."))
    for block in range(3):
        here = [x[n] for n in x if n.startswith(f"blk.{block}.")]
        assert max(here) < min(x[n] for n in x if n.startswith(f"blk.{block + 1}."))
    exact = {y[n] for n in y if "_norm" in n}
    assert len(exact) == 1
    assert exact.pop() < min(y[n] for n in y if "_norm" not in n)  # above: SVG counts downwards
    # against the labels of both axes: a value stands where a straight line between two ticks says
    ticks = axis(page(model()), "y")
    assert list(ticks) == [50.0, 52.0, 54.0, 56.0, 58.0, 60.0]
    height = (ticks[50.0] - ticks[60.0]) / 10  # of one dB
    assert height > 20
    for name, value in (
        ("blk.0.attn_q.weight", 59.0),
        ("blk.2.attn_q.weight", 58.5),
        ("blk.0.ffn_down.weight", 52.0),
    ):
        assert y[name] == pytest.approx(ticks[50.0] - height * (value - 50.0), abs=0.2)
    for at_block, middle in axis(page(model()), "x").items():
        here = [x[n] for n in x if n.startswith(f"blk.{at_block:g}.")]
        assert (min(here) + max(here)) / 2 == pytest.approx(middle, abs=10)


def test_plots_of_one_scale_can_be_compared() -> None:
    shown = page(model())
    ticks = [[e["text"] for e in shown.all("text", "end") if e["parent"] is p] for p in shown.all("svg", "plot")]
    assert ticks[1] == ticks[2] == ["0", "500", "1000", "1500", "2000", "2500", "3000"]


def test_roles_have_their_own_marks_and_the_rest_is_other() -> None:
    shown = page(model())
    plain = [e["text"] for e in shown.all("li")]
    legend = plain[: plain.index("other") + 1]
    big = ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"]
    assert legend == [*big, "attn_norm", "other"]
    marks = {(e["attrs"]["class"], e["attrs"]["d"].split("m", 1)[1]) for e in shown.all("path", "point")}
    assert len(marks) == 9  # as many outlines as colours
    assert len({outline for _, outline in marks}) == 9


def test_roles_are_read_from_names() -> None:
    names = ("blk.0.attn_q.weight", "blk.0.attn_q.bias", "v.blk.7.attn_q.weight", "output_norm.weight", "blk.x.y")
    depth = Depth((name, 10) for name in names)
    assert depth.roles == ["attn_q", "blk.x.y", "output_norm"]
    assert depth.role_of == [0, 0, 0, 2, 1]
    assert (depth.first, depth.last) == (0, 7)


def test_all_exact_needs_no_scale() -> None:
    shown = page(document([tensor(f"blk.{n}.attn_q.weight", compared(exact=True)) for n in range(8)]))
    assert [e["text"] for e in shown.all("text", "end")] == ["exact"]
    assert len({y for _, y in places(shown).values()}) == 1
    assert "8 of 8 compared tensors exact." in shown.text


def test_a_single_value_stands_inside_its_scale() -> None:
    shown = page(VARIANTS["one tensor"])
    ticks = [float(e["text"]) for e in shown.all("text", "end") if e["parent"] is shown.all("svg", "plot")[0]]
    assert ticks[0] < 50.0 < ticks[-1]


@pytest.mark.parametrize("value", [-5.0, 0.0, 1e-9, 0.3, 1234567.0, 1e300])
def test_any_value_has_a_scale_of_few_ticks(value: float) -> None:
    tensors = [tensor("blk.0.a", compared(value), [run(abs(value))]), tensor("blk.1.a", compared(value + 0.1))]
    shown = page(document(tensors))
    assert 4 <= len(shown.all("text", "end")) <= 18
    assert all(0 <= y <= 340 for _, y in places(shown).values())


def test_a_slow_reference_has_a_scale_of_its_own() -> None:
    tensors = [tensor("blk.0.a", None, [run(0.00153)]), tensor("blk.1.a", None, [run(0.0298)])]
    shown = page(document(tensors))
    assert list(axis(shown, "y")) == pytest.approx([0.0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03])
    assert shown.tooltips() == ["blk.0.a: 0.00153 GB/s", "blk.1.a: 0.0298 GB/s"]
    assert shown.rows("Results on the device")[0][4:] == ["0.00153", "0.0157", "0.0298"]


def test_tensors_without_blocks_fill_the_plot_in_order() -> None:
    shown = page(VARIANTS["no blocks"])
    xs = [x for x, _ in places(shown).values()]
    assert xs == sorted(xs)
    assert len(set(xs)) == 30
    assert xs[-1] - xs[0] > 800
    assert "tensor, in the bundle's order" in shown.text


def test_a_thousand_tensors_stay_inside_the_plot() -> None:
    report = VARIANTS["thousand"]
    shown = page(report)
    at = places(shown)
    assert len(at) == len(report["tensors"]) == 1001
    assert all(66 <= x <= 946 and 0 <= y <= 340 for x, y in at.values())
    assert len(shown.rows("All tensors, worst first")) == 1001
    assert "222 of 1,001 compared tensors exact" in shown.text


def test_many_settings_are_not_all_plotted() -> None:
    runs = [run(100.0 * m, m=m) for m in range(1, 12)]
    shown = page(document([tensor("blk.0.a", None, runs)]))
    assert len(shown.all("svg", "plot")) == 8
    assert "3 more settings not plotted." in shown.text
    assert len(shown.rows("Results on the device")) == 11


# --- in a browser -----------------------------------------------------------------------------------------------


def browse(tmp_path: Path, source: str, *options: str) -> str:
    """Open a page in a browser with a fresh profile; what it prints."""
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            *(f"--disable-{name}" for name in quiet),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=800,600",
            "--hide-scrollbars",
            *options,
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        timeout=180,
        check=True,
    )
    return done.stdout.decode("utf-8")


def pixels(path: Path) -> list[list[bytes]]:
    """The rows of a PNG's RGB pixels: 8 bits, not interlaced, as browsers write them."""
    data, at, packed = path.read_bytes(), 8, b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width = height = step = 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, at + 8 + length)[0]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0)
            step = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw, stride = zlib.decompress(packed), 1 + width * step
    assert len(raw) == stride * height
    rows, above = [], bytearray(width * step)
    for start in range(0, len(raw), stride):
        how, line = raw[start], bytearray(raw[start + 1 : start + stride])
        for i in range(len(line)):
            left, up, corner = (line[i - step], above[i], above[i - step]) if i >= step else (0, above[i], 0)
            nearest = min((left, up, corner), key=lambda v, p=left + up - corner: abs(p - v))  # type: ignore[misc]
            line[i] = (line[i] + (0, left, up, (left + up) // 2, nearest)[how]) & 255
        rows.append([bytes(line[i : i + 3]) for i in range(0, len(line), step)])
        above = line
    return rows


@needs_browser
def test_a_browser_builds_the_page_as_written(tmp_path: Path) -> None:
    report = failed()
    report["tensors"].append(tensor(f"blk.0.{HOSTILE}", compared(20.0)))
    report["bundle"] = HOSTILE
    written = page(report)
    shown = browse(tmp_path, html_report(report), "--dump-dom")
    built = Page(re.sub(r"<!DOCTYPE html>", "", shown))
    assert built.all("h1")[0]["text"] == "✗ Failed"
    assert built.all("title")[0]["text"] == f"Failed: {HOSTILE}"  # no script set another one
    assert built.tooltips() == written.tooltips()
    assert f"blk.0.{HOSTILE}: 20.00 dB" in built.tooltips()
    assert places(built) == places(written)
    assert len(built.all("path", "point")) == len(written.all("path", "point")) > 38
    assert [e["tag"] for e in built.elements] == [e["tag"] for e in written.elements]
    assert {"script", "img"}.isdisjoint(e["tag"] for e in built.elements)


@needs_browser
@pytest.mark.parametrize(
    ("scheme", "background", "verdict"),
    [pytest.param(1, "f6f6f4", "0b6b2f", id="light"), pytest.param(0, "111214", "6fd394", id="dark")],
)
def test_a_browser_paints_the_page(tmp_path: Path, scheme: int, background: str, verdict: str) -> None:
    picture = tmp_path / "page.png"
    browse(
        tmp_path, html_report(model()), f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}"
    )
    rows = pixels(picture)
    assert (len(rows), len(rows[0])) == (600, 800)
    assert rows[0][0].hex() == background  # the style sheet is not kept out by the page's own policy
    colours = [colour for row in rows for colour in row]
    assert colours.count(bytes.fromhex(verdict)) > 500
    assert len({b"".join(row) for row in rows}) > 150
    assert len(set(colours)) > 100
