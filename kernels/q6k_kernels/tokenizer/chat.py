"""Chat templates: Jinja programs that come with a model and turn messages into one text.

A template is untrusted: it can loop, or build text that doubles with every turn. So it runs in Jinja's sandbox, in
a process of its own with limits on time and memory. It sees the messages and the names of a few tokens, nothing
else. This file is also the program of that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

MAX_TEMPLATE = 1 << 20
MAX_TEXT = 1 << 22
MEMORY_BYTES = 1 << 30
SECONDS = 10


class TemplateError(ValueError):
    """A template failed, refused the messages, or exceeded its time or memory; the message says which."""


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]) -> str:
    """Render the messages as one text that ends where the model's answer begins.

    Args:
        template: the Jinja text, at most `MAX_TEMPLATE` characters.
        messages: each with `role` and `content`.
        variables: further names for the template: `bos_token`, `eos_token` and others.

    Raises:
        TemplateError: rendering fails, or the text is longer than `MAX_TEXT` characters.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"the chat template has {len(template)} characters, more than the limit {MAX_TEMPLATE}")
    task = json.dumps({"template": template, "messages": list(messages), "variables": dict(variables)})
    # -P: the child must not import the modules beside this file.
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(  # noqa: S603 -- this file, by this Python
            command, input=task, capture_output=True, text=True, encoding="utf-8", check=False, timeout=3 * SECONDS
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        answer = None
    if answer is None:
        limits = f"{SECONDS} s or {MEMORY_BYTES >> 20} MiB"
        raise TemplateError(f"the chat template took more than {limits}, and was stopped")
    if "error" in answer:
        raise TemplateError(f"the chat template failed: {answer['error']}")
    return str(answer["text"])


def _environment() -> Any:
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError as JinjaError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `{% generation %}`, which marks an answer in training data; its body is ordinary text."""

        tags = {"generation"}  # noqa: RUF012 -- Jinja reads a class attribute

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> NoReturn:
        raise JinjaError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    now: Callable[[str], str] = lambda form: datetime.now().astimezone().strftime(form)  # noqa: E731
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        autoescape=False,  # the text is for a model, not for a browser
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    return environment


def _limit() -> None:
    import resource

    for what, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, SECONDS)):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _main() -> None:
    task = json.load(sys.stdin)
    environment = _environment()
    _limit()
    try:
        pieces, length = list[str](), 0
        template = environment.from_string(task["template"])
        for piece in template.generate(messages=task["messages"], add_generation_prompt=True, **task["variables"]):
            length += len(piece)
            if length > MAX_TEXT:
                raise ValueError(f"its text is longer than {MAX_TEXT} characters")
            pieces.append(piece)
        answer = {"text": "".join(pieces)}
    except Exception as error:  # whatever a template does wrong
        answer = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    _main()
