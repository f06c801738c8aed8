"""Chat templates: Jinja programs that come with a model and turn messages into one text.

A template is untrusted: it can loop, or build text that doubles with every turn. So it runs in Jinja's sandbox, in
a process of its own (`rendering`) with limits on time and memory. It sees the messages and the names of a few
tokens, nothing else: that process has an empty environment, and Jinja has to be a version whose sandbox holds.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from q6k_kernels.errors import PackageMissingError

MAX_TEMPLATE = 1 << 20
MAX_TEXT = 1 << 22
MEMORY_BYTES = 1 << 30
SECONDS = 10
OLDEST_JINJA = (3, 1, 6)
"""The first release of Jinja whose sandbox no known template leaves."""
_PROGRAM = Path(__file__).with_name("rendering.py")


class TemplateError(ValueError):
    """A template failed, refused the messages, or exceeded its time or memory; the message says which."""


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]) -> str:
    """Render the messages as one text that ends where the model's answer begins.

    Arguments and errors are those of `render_each`.
    """
    return render_each(template, [messages], variables)[0]


def render_each(
    template: str, conversations: Sequence[Sequence[Mapping[str, str]]], variables: Mapping[str, str]
) -> list[str]:
    """Render each conversation as one text that ends where the model's answer begins.

    Args:
        template: the Jinja text, at most `MAX_TEMPLATE` characters.
        conversations: messages, each with `role` and `content`, at most `MAX_TEXT` characters a conversation.
        variables: further names for the template: `bos_token`, `eos_token` and others.

    Raises:
        TemplateError: rendering fails, or a text is longer than `MAX_TEXT` characters.
        PackageMissingError: Jinja is missing or too old.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"the chat template has {len(template)} characters, more than the limit {MAX_TEMPLATE}")
    for messages in conversations:
        if (found := sum(len(value) for message in messages for value in message.values())) > MAX_TEXT:
            raise TemplateError(f"the messages have {found} characters, more than the limit {MAX_TEXT}")
    task = {
        "template": template,
        "conversations": [list(messages) for messages in conversations],
        "variables": dict(variables),
        "paths": _paths(),
        "most": MAX_TEXT,
        "memory": MEMORY_BYTES,
        "seconds": SECONDS,
    }
    try:
        done = subprocess.run(  # noqa: S603 -- our program, by this Python
            [sys.executable, "-I", "-S", str(_PROGRAM)],
            input=json.dumps(task).encode(),
            capture_output=True,
            env={},
            check=False,
            timeout=3 * SECONDS,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        answer = None
    if answer is None:
        limits = f"{SECONDS} s or {MEMORY_BYTES >> 20} MiB"
        raise TemplateError(f"the chat template took more than {limits}, and was stopped")
    if "error" in answer:
        raise TemplateError(f"the chat template failed: {answer['error']}")
    return [str(text) for text in answer["texts"]]


def check_syntax(template: str) -> None:
    """Check that a template is one of Jinja; errors are those of `render_each`."""
    render_each(template, [], {})


def _paths() -> list[str]:
    """Return the directories of Jinja and what it needs, after a check of its version."""
    wanted = ".".join(map(str, OLDEST_JINJA))
    remedy = "Install it: `pip install 'q6k-convert[inference]'`."
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    if len(origins) < len(specs):
        raise PackageMissingError(f"chat templates need jinja2 {wanted} or later: not installed", remedy)
    found = metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < OLDEST_JINJA:
        raise PackageMissingError(f"chat templates need jinja2 {wanted} or later, found {found}", remedy)
    return sorted({str(Path(origin).parents[1]) for origin in origins})
