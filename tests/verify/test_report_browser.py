"""How a browser builds and paints the HTML report."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from q6k_convert.verify.report import html_report
from report_pages import (
    HOSTILE,
    Page,
    compared,
    failed,
    model,
    page,
    places,
    tensor,
)

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


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


@needs_browser
def test_on_a_telephone_nothing_but_plots_is_wider_than_the_screen(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html_report(failed()), encoding="utf-8")
    measure = (
        "const page = frame.contentDocument, width = page.documentElement.clientWidth;"
        "const wide = [...page.querySelectorAll('main *')].filter(e => !e.closest('svg'))"
        ".filter(e => e.getBoundingClientRect().right > width);"
        "const named = page.querySelector('td:nth-child(3)');"
        "document.title = [width, page.documentElement.scrollWidth, wide.length,"
        " frame.contentWindow.getComputedStyle(named, '::before').content].join(' ');"
    )
    frame = f'<iframe id="frame" src="report.html" style="width:390px;height:844px;border:0" onload="{measure}">'
    built = Page(browse(tmp_path, frame, "--dump-dom", "--allow-file-access-from-files"))
    assert built.all("title")[0]["text"] == '390 390 0 "tensor"'
