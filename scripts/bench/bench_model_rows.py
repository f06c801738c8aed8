"""Make and print the rows of bench_model.py, with rooflines, targets and peers.

A row is a dict of figures. The roofline of a token is the time of reading the packed weights that it is multiplied
with, its row of the embedding, and the keys and values before it. The roofline of a prompt is that time or the time
of its products at the rate of a large bf16 product, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from synthetic_gpt_oss import SHAPES
from synthetic_shapes import Shape

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Target of rows of kind `what`: their `figure` shall be at most or at least `bound`."""

    what: str
    figure: str
    sense: Literal["<=", ">="]
    bound: float
    words: str
    tokens: int | None = None

    def applies(self, row: Row) -> bool:
        """Check whether the target is for this row and the row has the figure."""
        return (
            row["what"] == self.what
            and row.get(self.figure) is not None
            and self.tokens in (None, row.get("tokens"), row.get("context"))
        )

    def met(self, row: Row) -> bool:
        """Check whether the row reaches the target."""
        value = row[self.figure]
        return bool(value <= self.bound if self.sense == "<=" else value >= self.bound)


def _targets(decode: dict[int, int], prefill: dict[int, int]) -> tuple[Target, ...]:
    """Return a model's targets: tokens a second of decoding by the tokens before it, and of prompts by length."""
    return (
        Target("load", "gb_per_s", ">=", 3.5, "3.5 GB/s"),
        Target("memory", "share_of_needed", "<=", 1.06, "packed + KV + 6%"),
        *(Target("decode", "tokens_per_s", ">=", rate, f"{rate:,} tokens/s", at) for at, rate in decode.items()),
        *(Target("prefill", "tokens_per_s", ">=", rate, f"{rate:,} tokens/s", at) for at, rate in prefill.items()),
    )


TARGETS = {
    ("llama-1b", "q6_k"): _targets({2043: 2450}, {}),
    ("llama-8b", "q6_k"): _targets({2043: 535, 32_768: 365}, {512: 30_000, 2048: 38_000, 8192: 33_000}),
    ("llama-8b", "q4_k_m"): _targets({2043: 650}, {2048: 30_000}),
    ("gemma-27b", "q4_k_m"): _targets({2043: 200}, {2048: 8_500}),
}
"""Targets of whole models on an H200, by shape and mix."""
COLUMNS = (
    ("", "label", "{}", 14),
    ("tokens/s", "tokens_per_s", "{:.1f}", 11),
    ("GPU", "gpu_tokens_per_s", "{:.1f}", 11),
    ("ms", "ms", "{:.3f}", 10),
    ("fastest", "fastest_ms", "{:.3f}", 10),
    ("GB", "gb_read", "{:.2f}", 7),
    ("roofline", "roofline_tokens_per_s", "{:.0f}", 10),
    ("share", "roofline_share", "{:.1%}", 8),
    ("llama.cpp", "peer_tokens_per_s", "{}", 11),
)
HEADING = "".join(f"{title:>{width}}" for title, _, _, width in COLUMNS)
LEGEND = """\
tokens/s: by the clock of the host; GPU: by the GPU's, from its first kernel to its last; ms: of one token, or of
one prompt, the median; GB: read for it at least; roofline: at the bandwidth, or for prompts at the rate of a bf16
product, that this run measured"""


def targets_of(shape: Shape, mix: str) -> tuple[Target, ...]:
    """Return the targets of a model: none if it has other layers than its shape, or another mix."""
    return TARGETS.get((shape.name, mix), ()) if shape == SHAPES[shape.name] else ()


def decode_row(
    shape: Shape,
    context: int,
    tokens: int,
    packed: int,
    ms: list[float],
    gpu_ms: list[float],
    *,
    codes: bool = False,
) -> Row:
    """Return the row of decoding.

    Args:
        shape: shape of the model.
        context: number of tokens before the decoded ones.
        tokens: tokens decoded in each run.
        packed: bytes of packed weights read for each token: all linear layers, one row of the embedding.
        ms: milliseconds of whole runs by the host's clock.
        gpu_ms: milliseconds of whole runs by the GPU's clock; empty on a CPU.
        codes: whether the cache is one of 8 bits.
    """
    row = _row("decode", f"decode @{context}", ms, gpu_ms, tokens)
    # The mean number of positions before a token.
    read = packed + round(shape.kv_bytes(context + (tokens + 1) / 2, codes=codes))
    return row | {"context": context, "tokens": tokens, "gb_read": read / 1e9, "bytes_read": read}


def prefill_row(
    shape: Shape, tokens: int, packed: int, ms: list[float], gpu_ms: list[float], *, codes: bool = False
) -> Row:
    """Return the row of prefilling a prompt of `tokens` tokens; see `decode_row`."""
    row = _row("prefill", f"prefill {tokens}", ms, gpu_ms, tokens)
    row |= {"ms": _median(ms), "fastest_ms": min(ms)}
    head = shape.vocabulary * shape.hidden
    body = shape.multiplied - head
    # Pairs of positions, half of all or those in the window, for scores and for products with values.
    windows = [tokens if window is None else min(tokens, window) for window in shape.windows]
    pairs = (4 * tokens * window - 2 * window**2 for window in windows)
    attention = shape.heads * sum(each * size for each, (_, size) in zip(pairs, shape.key_heads, strict=True))
    read = packed + round(shape.kv_bytes(tokens, codes=codes))
    # The head sees one token.
    flops = 2 * (tokens * body + head) + attention
    return row | {"tokens": tokens, "gb_read": read / 1e9, "bytes_read": read, "flops": flops}


def _row(what: str, label: str, ms: list[float], gpu_ms: list[float], tokens: int) -> Row:
    return {
        "what": what,
        "label": label,
        "tokens_per_s": tokens * 1e3 / _median(ms),
        "gpu_tokens_per_s": tokens * 1e3 / _median(gpu_ms) if gpu_ms else None,
        "ms": _median(ms) / tokens,
        "fastest_ms": min(ms) / tokens,
        "all_ms": ms,
        "all_gpu_ms": gpu_ms,
    }


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def judge(row: Row, ceilings: Row, peers: Sequence[Row], targets: Sequence[Target]) -> None:
    """Add the roofline to a row, the peer's figure, and the targets, met or missed.

    Args:
        row: row of any kind.
        ceilings: `read_gb_per_s` and `matmul_tflops`, as far as they are measured.
        peers: figures of llama.cpp for the same model.
        targets: targets of the model.
    """
    bandwidth, rate = ceilings.get("read_gb_per_s"), ceilings.get("matmul_tflops")
    if row["what"] in ("decode", "prefill") and bandwidth and (row["what"] == "decode" or rate):
        seconds = max(row["bytes_read"] / bandwidth / 1e9, row.get("flops", 0) / ((rate or 1) * 1e12))
        count = row["tokens"] if row["what"] == "prefill" else 1
        row["roofline_tokens_per_s"] = count / seconds
        row["roofline_share"] = row["tokens_per_s"] * seconds / count
    key = {"decode": "context", "prefill": "tokens"}.get(row["what"])
    if key:
        same = [p["tokens_per_s"] for p in peers if p["what"] == row["what"] and p.get(key) == row[key]]
        row["peer_tokens_per_s"] = same[0] if same else None
    applying = [target for target in targets if target.applies(row)]
    row["targets"] = [{"target": target.words, "met": target.met(row)} for target in applying]


def verdict(row: Row) -> str:
    """Return a row's targets as text."""
    return ", ".join(f"{t['target']} {'met' if t['met'] else 'MISSED'}" for t in row.get("targets", []))


def line(row: Row) -> str:
    """Return a row of the table."""
    cells = [
        f"{'-' if row.get(key) is None else form.format(row[key]):>{width}}" for _, key, form, width in COLUMNS
    ]
    return f"{''.join(cells)}  {verdict(row)}".rstrip()


def load_line(row: Row) -> str:
    """Return a line about loading."""
    words = f"load: {row['seconds']:.2f} s, {row['gb_per_s']:.2f} GB/s; the first time {row['first_seconds']:.2f} s"
    return f"{words}  {verdict(row)}".rstrip()


def memory_line(row: Row) -> str:
    """Return a line about memory."""
    parts = [f"packed weights {_size(row['packed_bytes'])}", f"keys and values {_size(row['kv_bytes'])}"]
    if row.get("peak_bytes") is not None:
        parts += [
            f"peak {_size(row['peak_bytes'])}, {row['share_of_packed']:.3f} of the weights and "
            f"{row['share_of_needed']:.3f} of both",
            f"peak while loading {_size(row['load_peak_bytes'])}",
            f"kept by the allocator {_size(row['reserved_bytes'])}",
        ]
    return f"memory: {'; '.join(parts)}  {verdict(row)}".rstrip()


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3f} MB"


def summary(report: Row) -> str:
    """Return the table, and how many targets are met."""
    rows: list[Row] = report["rows"]
    parts = [f"\n{HEADING}", *(line(row) for row in rows if row["what"] in ("decode", "prefill"))]
    parts += [load_line(row) for row in rows if row["what"] == "load"]
    parts += [memory_line(row) for row in rows if row["what"] == "memory"]
    targets = [target for row in rows for target in row.get("targets", [])]
    met = (
        f"{sum(t['met'] for t in targets)} of {len(targets)} targets met" if targets else "no targets for this run"
    )
    return "\n".join([*parts, f"{met}; {report['seconds']:.0f} s"])
