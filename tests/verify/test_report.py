"""The HTML report: what it says, and that nothing in it can act."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from q6k_convert.verify.plot import safe
from q6k_convert.verify.report import html_report
from report_pages import (
    HOSTILE,
    VARIANTS,
    Page,
    compared,
    document,
    failed,
    model,
    page,
    run,
    tensor,
    unreadable,
)


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
    report["tensors"][-1].update(type=HOSTILE, storage=HOSTILE, format=HOSTILE)
    for key in ("bundle", "producer", "architecture"):
        report[key] = HOSTILE
    report["options"] = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    report["sources"] = [{"name": HOSTILE, "bytes": 1, "checksum": HOSTILE}]
    report["types"][0].update(type=HOSTILE, storage=HOSTILE, format=HOSTILE)
    report["stages"][0].update(stage=HOSTILE, state=HOSTILE, detail=HOSTILE)
    report["findings"] = [dict.fromkeys(("stage", "file", "tensor", "array", "problem"), HOSTILE)]
    source = html_report(report)
    shown = Page(source)
    assert {"script", "img"}.isdisjoint(e["tag"] for e in shown.elements)
    assert not [a for e in shown.elements for a in e["attrs"] if a.startswith("on") or a == "src"]
    assert shown.rows("Findings") == [[HOSTILE] * 5]
    assert shown.rows("Sizes by type")[0][:2] == [HOSTILE, f"{HOSTILE}, {HOSTILE}"]
    assert shown.all("p", "bundle")[0]["text"] == HOSTILE
    assert f"blk.0.{HOSTILE}: 20.00 dB" in shown.tooltips()


def test_what_does_not_print_is_spelled_out() -> None:
    assert safe("a\nb\x00\u202egpj\ud800é😀&") == "a\\nb\\x00\\u202egpj\\ud800é😀&amp;"
    assert html_report(document([tensor("\ud800\u2066x", compared(30.0))])).encode()


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
    assert rows[0][:6] == ["Q6_K", "planar, q6_k_exact", "9", "1,000,000", "6.5625", "53.20 dB"]
    assert rows[0][6:8] == ["820.00 kB", "820.00 kB"]
    assert rows[1][1:6] == ["dequantized", "4", "9", "16", "–"]
    widths = [float(e["attrs"]["width"]) for e in shown.all("rect")]
    assert widths == [73.8, 73.8, 1.0, 180.0]  # to one scale, and 5 bytes can still be seen
    assert "Q2_K: 5 B in the GGUF, 2.00 MB in the bundle" in [e["text"] for e in shown.all("title")]


def test_sizes_in_the_gguf_are_left_out_where_they_are_not_known() -> None:
    report = model()
    for row in report["types"]:
        row["bytes_in"] = 0
    shown = page(report)
    assert shown.rows("Sizes by type")[0][4:7] == ["6.5625", "53.20 dB", "820.00 kB"]
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
    assert rows["blk.0.a"][:4] == ["Q6_K", "scalar", "planar, q6_k_exact", "107.52 kB"]
    assert rows["blk.0.a"][4:] == ["–", "0", "yes", "–", "0.00195", "0.5", "–"]
    assert rows["c"][-2:] == ["not finite", "1"]
    assert "0 of 3 compared tensors exact; 3 without a defined ratio, not plotted." in shown.text


def test_scales_that_are_not_finite_are_counted_at_the_top() -> None:
    shown = page(model())
    facts = dict(zip([e["text"] for e in shown.all("dt")], [e["text"] for e in shown.all("dd")], strict=True))
    assert facts["scales that are NaN or infinite"] == "3"
    assert "scales that are NaN or infinite" not in page({**model(), "nonfinite_scales": None}).text
