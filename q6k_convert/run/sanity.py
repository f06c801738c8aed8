"""Check that a bundle's model works: its perplexity of a well-known sentence and its answer have to be in bounds.

This finds broken models and does not measure quality. A model that does not know the
language has a perplexity of thousands; one whose decoding is broken repeats itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert.errors import UsageError

if TYPE_CHECKING:
    from q6k_convert.run.generate_command import GenerateRequest
    from q6k_convert.run.session import Progress

# The beginning of the Declaration of Independence (1776), which models know by heart.
PROMPT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
    "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
    "requires that they should declare the causes which"
)
_KEPT = ("device", "dtype", "prompt_tokens", "generated_tokens", "stop_reason", "text")


def answer(
    request: GenerateRequest,
    bounds: dict[str, float],
    write: Callable[[str], None],
    note: Callable[[str], None],
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Return the model's answer to the prompt, with `status` "passed" or "failed", and what is out of bounds.

    Args:
        request: bundle, prompt, device and length of the answer.
        bounds: largest `perplexity` of the prompt, and `repetition` of the answer.
        write: called with each piece of the answer.
        note: called with each line about the progress.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        UsageError: the prompt has a single token.
        EnvironmentMissingError, ModelError, BundleError, OSError: see `generate_command.run`.
    """
    from q6k_convert.run.generate_command import run

    done = run(request, write, note, progress)
    found = {
        "perplexity": perplexity(request.model.bundle, done["prompt_token_ids"], done["device"], done["dtype"]),
        "repetition": repetition(done["token_ids"]),
    }
    # Every comparison with NaN is false, so NaN counts as out of bounds.
    bad = [
        f"{name} {value:.4g}, allowed is {bounds[name]:g}"
        for name, value in found.items()
        if not value <= bounds[name]
    ]
    if not done["token_ids"]:
        bad.append("the answer is empty")
    note(f"perplexity of the prompt {found['perplexity']:.4g}, repetition {found['repetition']:.2f}")
    row = {
        "status": "failed" if bad else "passed",
        **{name: round(value, 4) if math.isfinite(value) else None for name, value in found.items()},
        "bounds": bounds,
        **{name: done[name] for name in _KEPT},
    }
    return row, bad


def perplexity(bundle: Path, ids: list[int], device: str, dtype: str) -> float:
    """Return the perplexity per token of a text for the packed model; 1 is the least."""
    import torch

    from q6k_convert.run.perplexity import losses, perplexity_of
    from q6k_kernels import load_model

    if len(ids) < 2:
        raise UsageError("the prompt has a single token, of which nothing can be said", "Give a longer --prompt.")
    return perplexity_of(
        float(losses(load_model(bundle, device=device, dtype=getattr(torch, dtype)), [ids]).mean())
    )


def repetition(tokens: list[int]) -> float:
    """Return the share of tokens that occurred before: 0 for none, near 1 for an answer that repeats itself."""
    return 1 - len(set(tokens)) / len(tokens) if tokens else 0.0
