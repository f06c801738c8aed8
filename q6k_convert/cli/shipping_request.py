"""Request of `q6k-convert ci`: its options, and the names of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from q6k_convert.run.running import Device

STEPS = ("download", "convert", "verify", "answer", "export", "provenance", "checksums")


@dataclass(frozen=True)
class ShippingRequest:
    """Request of the command, whose options have the defaults."""

    model: str
    out: Path
    skip: tuple[str, ...]
    scales: Literal["bf16", "exact"]
    other: Literal["bf16", "raw", "skip", "error"]
    device: Device
    prompt: str
    max_new_tokens: int
    max_perplexity: float
    max_repetition: float
    export: Literal["auto", "always"]
    capacity: int | None
    force: bool
