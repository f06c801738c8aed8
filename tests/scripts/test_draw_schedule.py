"""What draw_schedule.py makes of rows: bytes one after another, never more ahead than rings hold; no GPU."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

torch = pytest.importorskip("torch")

import draw_schedule
from draw_schedule import BETWEEN, PRODUCTS, Pace, Span, picture, spans, summary, table
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.schedule import ATTENTION, NORM, SAME, VALUES, Schedule, ScheduleRow

Q6K, Q4K = weight_type("q6_k"), weight_type("q4_k")
NAMES = dict(enumerate(("layers.0.qkv_proj", "layers.0.o_proj", "layers.0.up_proj", "layers.0.gate", "lm_head"), 1))


def product(tiles: int, n: int, k: int, tag: int, total: int, **more: Any) -> ScheduleRow:
    return ScheduleRow(tiles=tiles, n=n, k=k, row_tiles=-(-n // 16), tag=tag, total=total, **more)


ROWS = [
    product(1, 192, 256, 0, 12, source=NORM),
    ScheduleRow(kind=ATTENTION, n=128, group=2, window=100, tag=1),
    product(2, 256, 128, 2, 16, source=VALUES, input=1),
    product(3, 512, 256, 3, 48, source=NORM, input=1),
    product(4, 256, 256, 3, 48, source=SAME, type=1, begin=32),
    product(5, 4096, 256, 5, 256, source=NORM, input=1, type=1),
]
SCHEDULE = Schedule(ROWS, (Q6K, Q4K), 64, 256, 10, torch.zeros(1, 4096), [])
BYTES = [12 * Q6K.tile_bytes, 64 * 100 * 4, 16 * Q6K.tile_bytes, 32 * Q6K.tile_bytes, 16 * Q4K.tile_bytes,
         256 * Q4K.tile_bytes]  # fmt: skip


def placed(gbs: float = 1.0, between: float = 2.0, context: int = 1000, ahead: int = 1 << 40) -> list[Span]:
    return list(spans(SCHEDULE, NAMES, Pace(gbs, between, context, ahead)))


@pytest.mark.parametrize("between", [0.0, 7.0, 300.0])
@pytest.mark.parametrize("ahead", [0, 100_000, 1 << 40])
def test_bytes_come_in_turn_and_wait_for_room(between: float, ahead: int) -> None:
    found = placed(between=between, ahead=ahead)
    loads = [span for span in found if span.lane == PRODUCTS]
    names = [name.rpartition(".")[2] for name in NAMES.values()]
    assert list(dict.fromkeys(span.name for span in loads)) == names
    assert {span.layer for span in loads[:-1]} <= {"0", ""}
    parts = {name: [span for span in loads if span.name == name] for name in names}
    assert [sum(span.nbytes for span in each) for each in parts.values()] == [BYTES[0], *BYTES[2:]]
    for lane in (PRODUCTS, BETWEEN):
        of_lane = [span for span in found if span.lane == lane]
        for earlier, later in pairwise(of_lane):
            assert earlier.end <= later.begin + 1e-9
    for span in loads:
        assert span.end - span.begin == pytest.approx(span.nbytes / 1e3)
    # What has come before a product begins is no more than the rings hold.
    starts = [span.end for span in found if span.lane == BETWEEN and span.name != "attention"]
    if between:
        for start, first in zip(starts, (1, 2, 4), strict=True):
            behind = [span for name in names[first:] for span in parts[name]]
            early = sum(min(max(start - span.begin, 0.0) * 1e3, span.nbytes) for span in behind)
            assert early <= ahead + 1e-3
    else:
        assert max(span.end for span in found) == pytest.approx(sum(BYTES) / 1e3)


def test_what_lies_between_is_hidden_where_rings_are_large() -> None:
    """All but the first handing on and attention's keys happens while the head's weights come."""
    wide, narrow = (max(span.end for span in placed(between=2.0, ahead=ahead)) for ahead in (1 << 40, 0))
    assert wide == pytest.approx(sum(BYTES) / 1e3)
    assert narrow == pytest.approx(sum(BYTES) / 1e3 + 4 * 2.0)


def test_the_table_and_the_summary_tell_the_same() -> None:
    found = placed(ahead=0)
    lines = list(table(found))
    assert [line.split()[4] for line in lines[1:3]] == ["qkv_proj", "attention"]
    assert lines[1].endswith("192x256        1.67")
    assert lines[2].split()[-2:] == ["attention", "128x100"]
    assert "gate " in lines[7]
    end = f"{max(span.end for span in found):.0f} us"
    assert end in summary(found, Pace(1.0, 2.0, 1000, 0))
    assert lines[-1].split()[1] == f"{found[-1].end:.2f}"


def test_the_picture_has_all_of_the_time() -> None:
    found = placed(ahead=0)
    root = ElementTree.fromstring(picture(found, "a <title>", 20.0))
    space = "{http://www.w3.org/2000/svg}"
    boxes = [group.find(f"{space}rect") for group in root.iter(f"{space}g")]
    drawn = sum(float(box.attrib["width"]) for box in boxes if box is not None)
    assert drawn / draw_schedule.MICROSECOND == pytest.approx(sum(span.end - span.begin for span in found), abs=0.1)
    bottom = max(float(box.attrib["y"]) for box in boxes if box is not None)
    assert bottom < float(root.attrib["height"])
    assert any("lm_head" in (title.text or "") for title in root.iter(f"{space}title"))


@pytest.mark.parametrize("svg", [False, True])
def test_the_command_draws_the_step_of_a_bundle(svg: bool, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("libgguf")
    from model_cases import LLAMA

    bundle, _ = LLAMA.bundle(tmp_path / "model")
    file = tmp_path / "a.svg"
    assert draw_schedule.main([str(bundle), "--context", "100", *(["--svg", str(file)] if svg else [])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "11 rows, 16 blocks, rings of 3; 0.001 GB at 4000 GB/s" in lines[-1]
    if svg:
        ElementTree.parse(file)
    else:
        layer = ["qkv_proj", "attention", "values", "o_proj", "sum", "gate_up_proj", "values", "down_proj", "sum"]
        found = [next(word for word in line.split()[3:] if not word.isdigit()) for line in lines[1:-1]]
        assert found == [*layer, *layer, "lm_head"]


def test_a_model_without_a_persistent_kernel_is_refused(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("libgguf")
    from tiny_mixtures import QWEN3MOE

    bundle, _ = QWEN3MOE.bundle(tmp_path)
    assert draw_schedule.main([str(bundle)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no persistent kernel for a PackedExperts: expected packed layers")
