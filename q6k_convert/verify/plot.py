"""Style sheet of the report, and plots of one value for each tensor over the model's depth, as inline SVG."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WIDTH, _LEFT, _RIGHT, _TOP, _BELOW = 960, 66, 946, 14, 48
_EXACT_LANE = 34  # height kept above the scale for tensors without any error
_MOST_DODGE = 72.0
_BLOCK = re.compile(r"(?:^|\.)blk\.([0-9]{1,6})\.(.*)", re.DOTALL)
_KINDS = re.compile(r"\.(weight|bias)$")
# One outline per role, drawn from its centre: colour alone does not tell eight roles apart for everyone.
_SHAPES = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.5-3.5h7v7h-7z",
    "m0-4.5l4.4 7.8h-8.8z",
    "m0-5l4.4 5l-4.4 5l-4.4-5z",
    "m0 4.5l4.4-7.8h-8.8z",
    "m-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "m0-2.1l2.4-2.4l2.1 2.1l-2.4 2.4l2.4 2.4l-2.1 2.1l-2.4-2.4l-2.4 2.4l-2.1-2.1l2.4-2.4l-2.4-2.4l2.1-2.1z",
    "m-4.2-4l8.4 8v-8l-8.4 8z",
)
_OTHER = "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z"
ROLES = len(_SHAPES)

# Each role has its colour by rank; dark mode has lighter shades of the same hues; print takes the light mode's.
CSS = """\
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #16181d; --soft: #565960;
  --line: #e3e3df; --good: #0b6b2f; --good-bg: #e7f5ec; --bad: #b3261e; --bad-bg: #fdecea; --in: #b4b6bb;
  --k0: #2a78d6; --k1: #0f9d70; --k2: #d18b00; --k3: #4a3aa7; --k4: #d9534f; --k5: #cf5f92; --k6: #5c7f00;
  --k7: #c95a1c; --k8: #85878c; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #111214; --card: #1a1b1e; --ink: #f0f0ee;
  --soft: #aeb0b6; --line: #303237; --good: #6fd394; --good-bg: #14291c; --bad: #ff8a80; --bad-bg: #331a18;
  --in: #64676e; --k0: #5b9df0; --k1: #2dbd8f; --k2: #e0a32e; --k3: #a79bff; --k4: #f07f7b; --k5: #e68bb5;
  --k6: #a3c244; --k7: #ee8a4e; --k8: #8f9299; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 48px; }
header, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 22px; margin: 0 0 16px; }
header { border-left: 8px solid var(--good); background: var(--good-bg); }
header.bad { border-left-color: var(--bad); background: var(--bad-bg); }
header p { margin: 4px 0 0; } header .kind { margin: 0; color: var(--soft); }
h1 { font-size: 2.7em; line-height: 1.15; margin: 0; color: var(--good); } header.bad h1 { color: var(--bad); }
h2 { font-size: 1.2em; margin: 0 0 10px; } h3 { font-size: 1em; margin: 22px 0 4px; }
section p { margin: 0 0 8px; color: var(--soft); max-width: 80ch; }
section.bad { border-color: var(--bad); } section.bad h2, strong.bad, span.bad { color: var(--bad); }
.bundle { font-weight: 600; } .bundle, th[scope=row], section.bad td, dd { overflow-wrap: anywhere; }
dl { margin: 0; } dt { color: var(--soft); font-size: .87em; } dd { margin: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 16px; }
.tiles div { flex: 1 1 10em; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 16px; }
.tiles dd { font-size: 1.33em; font-weight: 600; line-height: 1.3; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 10px 20px;
  margin-bottom: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-size: .93em; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 7em; } section.bad td { min-width: 13em; }
.tensors table, section.bad table { font-size: .87em; } .tensors tbody th { min-width: 15em; }
tbody tr:last-child > * { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; } thead .number { white-space: normal; }
.number + :not(.number) { padding-left: 10px; }
tr.bad th { color: var(--bad); } small { display: block; color: var(--soft); font-weight: 400; font-size: .93em;
  min-width: 17em; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 99px; border: 1px solid var(--line);
  color: var(--soft); white-space: nowrap; }
.passed { color: var(--good); background: var(--good-bg); border-color: transparent; }
.failed { color: var(--bad); background: var(--bad-bg); border-color: transparent; font-weight: 600; }
figure { margin: 8px 0 0; } figcaption { font-weight: 600; font-size: .93em; margin-top: 14px; }
.plot { display: block; width: 100%; min-width: 640px; height: auto; }
.bar { display: block; width: 180px; margin: 2px 0; }
rect.in { fill: var(--in); } rect.out { fill: var(--k0); }
span.in { color: var(--in); } span.out { color: var(--k0); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0 0; padding: 0;
  font-size: .87em; }
.legend li { display: flex; align-items: center; gap: 5px; } .key { width: 16px; height: 16px; }
.plot text { fill: var(--soft); font-size: 12.5px; text-anchor: middle; font-variant-numeric: tabular-nums; }
.plot text.end { text-anchor: end; } .plot text.strong { fill: var(--ink); font-weight: 600; }
.plot path { stroke-linejoin: round; } .grid, .edge { stroke: var(--line); fill: none; }
.base { stroke: var(--soft); fill: none; } .edge { stroke-dasharray: 2 4; }
.exact { stroke: var(--good); stroke-width: 1.5; stroke-dasharray: 6 4; fill: none; }
.point { stroke: var(--card); stroke-width: .75; } .ring { fill: none; stroke: var(--bad); stroke-width: 2; }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.k4 { fill: var(--k4); } .k5 { fill: var(--k5); } .k6 { fill: var(--k6); } .k7 { fill: var(--k7); }
.k8 { fill: var(--k8); }
@media screen and (max-width: 600px) { main { padding: 12px 10px 32px; } header, section { padding: 14px; }
  h1 { font-size: 2em; } thead { display: none; } table, tbody, tr { display: block; } tr { padding: 8px 0;
  border-bottom: 1px solid var(--line); } tbody tr:last-child { border-bottom: 0; } th, td, tbody th,
  section.bad td, .tensors tbody th { display: block; border: 0; padding: 1px 0; min-width: 0; }
  td, section.bad td { display: flex; justify-content: space-between; gap: 14px; text-align: right;
  white-space: normal; overflow-wrap: anywhere; }
  td::before { content: attr(data-name); color: var(--soft); text-align: left; flex: 0 0 auto; max-width: 48%; }
  .number + :not(.number) { padding-left: 0; } small { min-width: 0; } }
@media print { body { background: none; font-size: 11px; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } th, td { padding: 3px 7px 3px 0; }
  .wide { overflow: visible; } section.bad td { min-width: 9em; }
  .tensors table { font-size: 8px; } .tensors tbody th { min-width: 14em; } .tensors td { padding-right: 4px; }
  .plot { min-width: 0; } header, section { padding: 10px 14px; }
  header, figure, tr, .tiles div { break-inside: avoid; } h2, h3, figcaption { break-after: avoid; } }
"""


def safe(value: object) -> str:
    """Return a text of unknown origin as HTML; characters that do not print or that reorder a line are escaped."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)), quote=True)


@dataclass(frozen=True)
class Point:
    """Mark of one tensor: `tensor` is its index in the report, `value` is None for "exact"."""

    tensor: int
    value: float | None
    shown: str
    marked: bool = False


@dataclass(frozen=True)
class Scale:
    """Scale of the y axis. `from_zero` is for amounts, which start at zero."""

    title: str
    label: str
    from_zero: bool
    height: int = 340


class Depth:
    """Position of each tensor on the x axis, and its role."""

    def __init__(self, tensors: Iterable[tuple[str, int]]) -> None:
        """Arrange tensors, given as names and weight counts in the report's order."""
        self.names: list[str] = []
        self._blocks: list[int | None] = []
        roles: list[str] = []
        weights = dict[str, tuple[bool, int]]()
        for name, count in tensors:
            match = _BLOCK.search(name)
            role = _KINDS.sub("", match[2] if match else name)
            self.names.append(name)
            self._blocks.append(int(match[1]) if match else None)
            roles.append(role)
            repeats, total = weights.get(role, (False, 0))
            weights[role] = (repeats or match is not None, total + count)
        # Roles that every block repeats get colours first; tensors at the ends are known by their position.
        ranked = sorted(weights, key=lambda role: (not weights[role][0], -weights[role][1], role))
        self.roles = ranked[:ROLES]
        place = {role: number for number, role in enumerate(self.roles)}
        self.role_of = [place.get(role, ROLES) for role in roles]
        self._arrange()

    def _arrange(self) -> None:
        inside = [block for block in self._blocks if block is not None]
        loose = [n for n, block in enumerate(self._blocks) if block is None]
        after = [n for n in loose if self._stands_after(n, inside)]
        before = [n for n in loose if not self._stands_after(n, inside)]
        self.first, self.last = (min(inside), max(inside)) if inside else (0, 0)
        width = float(_RIGHT - _LEFT)
        even = width / (self.last - self.first + 1 + bool(before) + bool(after))

        def end(members: list[int]) -> float:
            return max(56.0, min(even, 120.0), min(len(members) * 9.0, width / 4)) if members else 0.0

        self.start = _LEFT + (end(before) if inside else width)
        self.stop = _RIGHT - end(after)
        self.slot = (self.stop - self.start) / (self.last - self.first + 1)
        self.x = [0.0] * len(self.names)
        dodge = min(self.slot * 0.8, _MOST_DODGE) / (ROLES + 1)
        for n, block in enumerate(self._blocks):
            if block is not None:
                self.x[n] = self.centre(block) + (self.role_of[n] - ROLES / 2) * dodge
        for left, right, members in ((_LEFT, self.start, before), (self.stop, _RIGHT, after)):
            for k, n in enumerate(members):
                self.x[n] = left + (right - left) * (k + 0.5) / len(members)
        self.ends = [("input", (_LEFT + self.start) / 2)] if before and inside else []
        self.ends += [("output", (self.stop + _RIGHT) / 2)] if after else []
        self.label = "block (tensors outside the blocks at the ends)" if inside else "tensor, in the bundle's order"
        self.has_blocks = bool(inside)

    def _stands_after(self, tensor: int, inside: list[int]) -> bool:
        return bool(inside) and self.names[tensor].startswith("output")

    def centre(self, block: float) -> float:
        """Return the x coordinate of a block's middle."""
        return self.start + (block - self.first + 0.5) * self.slot


def plot(depth: Depth, scale: Scale, points: Sequence[Point], most: float | None = None) -> str:
    """Return an SVG of the points; `most` is the largest value of all plots that share a scale."""
    values = [p.value for p in points if p.value is not None]
    exact = any(p.value is None for p in points)
    height = scale.height if values else 150
    top = _TOP + (_EXACT_LANE if exact and values else 0)
    bottom = height - _BELOW
    lane = _TOP + 8 if values else (_TOP + bottom) / 2
    ticks = _value_ticks(values, scale.from_zero, most) if values else []

    def y(value: float | None) -> float:
        return lane if value is None else bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts = [
        f'<svg class="plot" role="img" viewBox="0 0 {_WIDTH} {height}"><title>{safe(scale.title)}</title>',
        *_depth_axis(depth, bottom),
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {_n(y(tick))}H{_RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{_n(y(tick) + 4)}">{tick:g}</text>')
    if exact:
        parts.append(f'<path class="exact" d="M{_LEFT} {_n(lane)}H{_RIGHT}"/>')
        parts.append(f'<text class="tick end strong" x="{_LEFT - 8}" y="{_n(lane + 4)}">exact</text>')
    if values:
        middle = _n((top + bottom) / 2)
        parts.append(
            f'<text class="axis" transform="translate(14 {middle}) rotate(-90)">{safe(scale.label)}</text>'
        )
    # Marked tensors are drawn last, so that their neighbours do not hide them.
    for p in sorted(points, key=lambda p: p.marked):
        role, at = depth.role_of[p.tensor], f"{_n(depth.x[p.tensor])} {_n(y(p.value))}"
        ring = f'<path class="ring" d="M{at}m-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0z"/>' if p.marked else ""
        tip = f"<title>{safe(depth.names[p.tensor])}: {safe(p.shown)}</title>"
        parts.append(f'<g>{ring}<path class="point k{role}" d="M{at}{_outline(role)}">{tip}</path></g>')
    return "".join(parts) + "</svg>"


def legend(depth: Depth, points: Iterable[Point]) -> str:
    """Return an HTML list of the roles that occur among the points, each with its mark."""
    points = list(points)
    items = [
        f'<li><svg class="key" viewBox="-7 -7 14 14" aria-hidden="true"><path class="point k{role}" '
        f'd="M0 0{_outline(role)}"/></svg>{safe(_short(depth.roles[role]) if role < ROLES else "other")}</li>'
        for role in sorted({depth.role_of[p.tensor] for p in points})
    ]
    if any(p.marked for p in points):
        items.append(
            '<li><svg class="key" viewBox="-9 -9 18 18" aria-hidden="true"><path class="ring" '
            'd="M-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0z"/></svg>failed or with a finding</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _depth_axis(depth: Depth, bottom: float) -> list[str]:
    parts = [f'<path class="base" d="M{_LEFT} {bottom}H{_RIGHT}"/>']
    marks = list(depth.ends)
    if depth.has_blocks:
        step = _step(depth.last - depth.first + 1, 20, smallest=1)
        first = math.ceil(depth.first / step) * step
        marks += [(f"{b:g}", depth.centre(b)) for b in _range(first, depth.last, step)]
    for word, x in marks:
        parts.append(f'<path class="base" d="M{_n(x)} {bottom}v5"/>')
        parts.append(f'<text class="tick" x="{_n(x)}" y="{bottom + 19}">{word}</text>')
    for word, _ in depth.ends:  # a line parts the ends from the blocks
        edge = _n(depth.start if word == "input" else depth.stop)
        parts.append(f'<path class="edge" d="M{edge} {_TOP}V{bottom}"/>')
    parts.append(f'<text class="axis" x="{(_LEFT + _RIGHT) / 2:g}" y="{bottom + 40}">{depth.label}</text>')
    return parts


def _value_ticks(values: list[float], from_zero: bool, most: float | None) -> list[float]:
    low, high = min(values), max(values) if most is None else most
    if from_zero:
        low = min(low, 0.0)
    least = 1e-9 if from_zero else max(2.0, abs(high) * 1e-6, abs(low) * 1e-6)
    if high - low < least:  # equal values stand in the middle of the scale, not at an edge
        low, high = (low, low + least) if from_zero else ((low + high - least) / 2, (low + high + least) / 2)
    step = _step(high - low, 6)
    return _range(math.floor(low / step) * step, math.ceil(high / step) * step, step)


def _step(span: float, most: int, smallest: float = 0.0) -> float:
    """Return the least of 1, 2, 5, 10, ... that divides the span into at most `most` parts."""
    base = 10.0 ** math.floor(math.log10(span / most))
    return max(smallest, next(base * k for k in (1, 2, 5, 10, 20) if span <= base * k * most))


def _range(first: float, last: float, step: float) -> list[float]:
    return [first + k * step for k in range(math.floor((last - first) / step + 1e-6) + 1)]


def _outline(role: int) -> str:
    return _SHAPES[role] if role < ROLES else _OTHER


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _n(value: float) -> str:
    """Return a coordinate rounded to a tenth, as text."""
    return f"{value:.1f}".removesuffix(".0")
