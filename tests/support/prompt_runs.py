"""Runs of `generate --prompts FILE --out FILE` on a tiny model, and their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result

from bundle_helpers import invoke
from tiny_bundle import TinyBundle

LINES: list[dict[str, Any]] = [
    {"prompt": "The dog", "max_new_tokens": 40, "id": 7},
    {"prompt": "The", "temperature": 0.9, "top_k": 9, "seed": 3},
    {"messages": [{"role": "user", "content": "a dog"}], "max_new_tokens": 2},
    {"prompt": "dog The", "temperature": 0.7, "repeat_penalty": 1.2, "id": {"of": ["any", None]}},
    {"prompt": "ran"},
]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(tiny: TinyBundle, prompts: Path, *more: str | Path) -> Result:
    out = prompts.with_name("answers.jsonl")
    given = ("--prompts", prompts, "--out", out, "--max-new-tokens", "12", "--seed", "5", "--device", "cpu")
    return invoke("generate", tiny.path, *given, *more)


def answers(prompts: Path) -> list[dict[str, Any]]:
    part = prompts.with_name("answers.jsonl.part")
    assert not part.exists()
    return [json.loads(line) for line in prompts.with_name("answers.jsonl").read_text().splitlines()]
