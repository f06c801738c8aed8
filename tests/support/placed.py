"""A bundle in a place, and what happens there while another is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle_helpers import convert_module, two_tensors
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options

Patch = pytest.MonkeyPatch


def other_bundle(out: Path) -> None:
    made = out.parent.parent / "made"
    convert(two_tensors(rows=3, seed=9).write(made.with_name("old.gguf")), made, Options(max_shard_size=600))
    out.parent.mkdir(exist_ok=True)
    made.rename(out)


def meanwhile(monkeypatch: Patch, change: Callable[[], object]) -> None:
    """Let something happen when the output has been checked and the work has begun."""
    real = convert_module.stream

    def stream(*args: Any) -> Any:
        change()
        return real(*args)

    monkeypatch.setattr(convert_module, "stream", stream)
