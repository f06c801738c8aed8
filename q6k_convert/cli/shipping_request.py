"""Request of `q6k-convert ci`: its options, and the names of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from q6k_convert.run.running import Device
from q6k_convert.run.sanity import PROMPT

STEPS = ("download", "convert", "verify", "answer", "export", "provenance", "checksums")


@dataclass(frozen=True)
class ShippingRequest:
    """Request of the command; see its options."""

    model: str
    out: Path
    skip: tuple[str, ...] = ()
    scales: Literal["bf16", "exact"] = "bf16"
    other: Literal["bf16", "raw", "skip", "error"] = "bf16"
    device: Device = "auto"
    prompt: str = PROMPT
    max_new_tokens: int = 48
    max_perplexity: float = 100.0
    max_repetition: float = 0.9
    export: Literal["auto", "always"] = "auto"
    capacity: int | None = None
    force: bool = False
