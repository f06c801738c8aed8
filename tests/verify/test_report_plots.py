"""The plots of the HTML report: points, scales and marks."""

from __future__ import annotations

import pytest

from q6k_convert.verify.plot import Depth
from report_pages import (
    VARIANTS,
    axis,
    compared,
    document,
    model,
    page,
    places,
    run,
    tensor,
)


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
