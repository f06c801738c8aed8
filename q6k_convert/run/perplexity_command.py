"""Compute the perplexity of a bundle's model on a text."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q6k_convert import text
from q6k_convert.errors import InputRejectedError, UsageError
from q6k_convert.run.places import STDIN
from q6k_convert.run.running import name_of
from q6k_convert.run.session import ModelRequest, Note, Progress, Session

MAX_FILE_BYTES = 1 << 24
DEFAULT_WINDOW = 512
_TELL_SECONDS = 5.0
"""Between two lines about the progress."""


@dataclass(frozen=True)
class PerplexityRequest:
    """Request of the command; see its options."""

    model: ModelRequest
    file: Path
    window: int | None = None
    windows: int | None = None


def run(request: PerplexityRequest, note: Note, progress: Progress) -> dict[str, Any]:
    """Compute the perplexity, and return the document for `--json`.

    Args:
        request: request of the command.
        note: called with each line about the progress.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        UsageError: the window is longer than the model knows.
        InputRejectedError: the file is no text in UTF-8, or has fewer than two tokens.
        Q6KConvertError, ModelError, BundleError, OSError: see `Session`.
    """
    content = _content(request.file)
    session = Session(request.model, "computing a perplexity", note)
    known = session.metadata.context_length
    if request.window is not None and known is not None and request.window > known:
        raise UsageError(f"--window {request.window}: the model knows {known} positions", "Give a smaller one.")
    window = request.window or min(DEFAULT_WINDOW, known or DEFAULT_WINDOW)
    tokenizer = session.tokenizer()
    from q6k_convert.run.perplexity import losses, summary, windows_of

    windows = windows_of(tokenizer, content, window)[: request.windows]
    if not windows:
        raise InputRejectedError(f"{request.file}: expected two tokens or more", "Give a longer text.")
    coded = request.model.cache != "model"
    model = session.model(window if coded else None, progress)
    tokens = sum(len(window) - 1 for window in windows)
    note(f"reading {text.plural(tokens, 'token')} in {text.plural(len(windows), 'window')}")
    with session.timed("reading"):
        found = losses(model, windows, _teller(len(windows), note), request.model.cache)
    result = summary(found)
    if not math.isfinite(result["perplexity"]):
        note("the perplexity is not finite: the model's logits are infinite or not numbers, or far off")
    finite = {name: value if math.isfinite(value) else None for name, value in result.items()}
    return {
        "status": "done",
        "bundle": str(request.model.bundle),
        "file": str(request.file),
        "device": str(session.device),
        "dtype": name_of(session.dtype),
        "activations": request.model.activations,
        "cache": request.model.cache,
        "window": window,
        "windows": len(windows),
        "tokens": tokens,
        **finite,
        "seconds": session.seconds,
        "tokens_per_second": tokens / session.seconds["reading"],
    }


def summed_up(document: dict[str, Any]) -> str:
    """Return the result as one line."""
    value, error = (document[name] for name in ("perplexity", "perplexity_error"))
    words = "not finite" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
    tokens, windows = text.plural(document["tokens"], "token"), text.plural(document["windows"], "window")
    return f"perplexity {words} of {tokens} in {windows}"


def _content(path: Path) -> str:
    if path == STDIN:
        raw = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    else:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise InputRejectedError(f"{path}: longer than {text.size(MAX_FILE_BYTES)}", "Give a part of it.")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputRejectedError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}", "Give a file of plain text."
        ) from error


def _teller(count: int, note: Note) -> Callable[[int, float], None]:
    """Return what tells, now and then, how many windows are done and the perplexity so far."""
    last = time.monotonic()

    def tell(done: int, mean: float) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _TELL_SECONDS:
            last = now
            note(f"window {done} of {count}, perplexity so far {perplexity_of(mean):.4f}")

    from q6k_convert.run.perplexity import perplexity_of

    return tell
