"""Check that a bundle's model works: its perplexity of a well-known sentence and its answer have to be in bounds.

This finds broken models and does not measure quality; `eval_quality.py` does. A model that does not know the
language has a perplexity of thousands; one whose decoding is broken repeats itself.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from q6k_convert.cli.terminal import Terminal
from q6k_convert.errors import UsageError

# The beginning of the Declaration of Independence (1776), which models know by heart.
PROMPT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
    "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
    "requires that they should declare the causes which"
)
_KEPT = ("device", "dtype", "prompt_tokens", "generated_tokens", "stop_reason", "text")


def answer(bundle: Path, args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Return the model's answer to the prompt, with `status` "passed" if it is in bounds, else "failed".

    Args:
        bundle: bundle of the model.
        args: prompt, max_new_tokens, device, max_perplexity, max_repetition.
        terminal: shows the progress, and what is out of bounds.

    Raises:
        EnvironmentMissingError, ModelError, BundleError, OSError: see `generate_command.run`.
    """
    from q6k_convert.run.generate_command import GenerateRequest, run

    request = GenerateRequest(bundle, args.prompt, max_new_tokens=args.max_new_tokens, device=args.device)
    done = run(request, terminal.stream, terminal.note, terminal.progress)
    found = {
        "perplexity": perplexity(bundle, done["prompt_token_ids"], done["device"], done["dtype"]),
        "repetition": repetition(done["token_ids"]),
    }
    bounds = {"perplexity": args.max_perplexity, "repetition": args.max_repetition}
    # Every comparison with NaN is false, so NaN counts as out of bounds.
    bad = [
        f"{name} {value:.4g}, allowed is {bounds[name]:g}"
        for name, value in found.items()
        if not value <= bounds[name]
    ]
    if not done["token_ids"]:
        bad.append("the answer is empty")
    terminal.note(f"perplexity of the prompt {found['perplexity']:.4g}, repetition {found['repetition']:.2f}")
    if bad:
        terminal.error(
            f"the model's answer is not to be trusted: {'; '.join(bad)}",
            "Compare it with that of another program; --max-perplexity and --max-repetition set the bounds.",
        )
    return {
        "status": "failed" if bad else "passed",
        **{name: round(value, 4) if math.isfinite(value) else None for name, value in found.items()},
        "bounds": bounds,
        **{name: done[name] for name in _KEPT},
    }


def perplexity(bundle: Path, ids: list[int], device: str, dtype: str) -> float:
    """Return the perplexity per token of a text for the packed model; 1 is the least."""
    import torch

    from q6k_convert.run.perplexity import losses
    from q6k_kernels import load_model

    if len(ids) < 2:
        raise UsageError("the prompt has a single token, of which nothing can be said", "Give a longer --prompt.")
    mean = float(losses(load_model(bundle, device=device, dtype=getattr(torch, dtype)), [ids]).mean())
    return math.exp(mean) if mean < 700 else math.inf if mean > 0 else math.nan


def repetition(tokens: list[int]) -> float:
    """Return the share of tokens that occurred before: 0 for none, near 1 for an answer that repeats itself."""
    return 1 - len(set(tokens)) / len(tokens) if tokens else 0.0
