"""What count_kernels.py makes of Nsight Compute's output; no GPU."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

SCRIPTS = Path(__file__).parents[2] / "scripts"

import count_kernels
from count_kernels import counted, table

CASES = ((1, (4096, 4096), "q6_k"), (8, (21504, 5376), "q4_k"))
DURATION, DRAM, L2, ISSUE, TENSOR, WARPS = (metric for _, metric, _ in count_kernels.COLUMNS)
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
HEADER = [
    "ID", "Process ID", "Kernel Name", DURATION, DRAM, L2, ISSUE, WARPS,
    *(STALLED.format(name) for name in ("long_scoreboard", "selected", "lg_throttle", "wait")),
]  # fmt: skip
QUANTIZE = ["0", "77", "q6k_quantize", "1.50", "3", "4", "5", "6.0", "1", "1", "1", "1"]
SHORT = ["1", "77", "q6k_decode", "5,312.25", "71.52", "40.01", "33.3", "15.96", "2.50", "1.00", "0.25", "3.75"]
LONG = ["2", "77", "q6k_decode", "1,005,312", "90.4", "n/a", "50.0", "12.00", "9.5", "30.0", "0.00", "n/a"]


def report(rows: list[list[str]], unit: str = "ns", header: list[str] = HEADER) -> str:
    """As `ncu --csv --page raw` prints it: its own messages, the names, the units, a row for each launch."""
    units = ["", "", "", unit, "%", "%", "%", "warp", "inst", "inst", "inst", "inst"]
    lines = io.StringIO()
    csv.writer(lines, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([header, units, *rows])
    return (
        "==PROF== Connected to process 77\n==PROF== Profiling, 0%....100%\n"
        + lines.getvalue()
        + "==PROF== Disconnected\n"
    )


def test_each_case_has_its_counters() -> None:
    first, second = counted(report([QUANTIZE, SHORT, LONG]), CASES)
    assert {name: first[name] for name in ("m", "n", "k", "format", "kernel")} == {
        "m": 1, "n": 4096, "k": 4096, "format": "q6_k", "kernel": "q6k_decode",
    }  # fmt: skip
    assert first["us"] == pytest.approx(5.31225)
    figures = [first[title] for title in ("DRAM %", "L2 %", "issue %", "warps")]
    assert figures == [71.52, 40.01, 33.3, 15.96]
    assert list(first["waits"].items()) == [("wait", 3.75), ("long_scoreboard", 2.5), ("lg_throttle", 0.25)]
    assert (second["m"], second["n"], second["k"], second["format"]) == (8, 21504, 5376, "q4_k")
    assert second["us"] == pytest.approx(1005.312)
    assert list(second["waits"].items()) == [("long_scoreboard", 9.5), ("lg_throttle", 0.0)]


def test_an_unknown_unit_is_an_error() -> None:
    with pytest.raises(ValueError, match="'fortnight'"):
        counted(report([SHORT, LONG], "fortnight"), CASES)


def test_what_is_missing_is_left_out_of_the_table() -> None:
    """A metric that this GPU does not have is not printed; one that could not be read is n/a."""
    rows = counted(report([SHORT, LONG]), CASES)
    assert [row["tensor %"] for row in rows] == [None, None]
    assert rows[1]["L2 %"] is None
    lines = table(rows).splitlines()
    assert lines == [
        "| M | N x K | format | us | DRAM % | L2 % | issue % | tensor % | warps | waits |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| 1 | 4096x4096 | q6_k | 5.3 | 72 | 40 | 33 | - | 16.0 | wait 3.8, long scoreboard 2.5 |",
        "| 8 | 21504x5376 | q4_k | 1005.3 | 90 | - | 50 | - | 12.0 | long scoreboard 9.5, lg throttle 0.0 |",
    ]
    without = [*HEADER[:3], "launch__grid_size", *HEADER[4:]]
    assert [row["us"] for row in counted(report([SHORT, LONG], header=without), CASES)] == [None, None]


@pytest.mark.parametrize("rows", [[], [QUANTIZE, SHORT], [SHORT, LONG, SHORT]])
def test_another_number_of_products_is_an_error(rows: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="expected counters of 2 products, found"):
        counted(report(rows), CASES)


def test_durations_in_other_units_are_in_microseconds() -> None:
    assert counted(report([SHORT, LONG], "usecond"), CASES)[0]["us"] == pytest.approx(5312.25)
