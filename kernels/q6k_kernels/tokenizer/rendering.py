"""The program that renders one chat template: a task as JSON on stdin, texts or an error as JSON on stdout.

`chat` runs it in a process of its own, isolated from the user's Python paths and with an empty environment. It
imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def render_task(task: dict[str, Any]) -> dict[str, Any]:
    """Render a template in Jinja's sandbox, and return {"texts": [...]} or {"error": ...}.

    Args:
        task: "template", "conversations" (lists of messages), "variables", and "most", the limit on a text's
            characters.
    """
    environment = _environment()
    # Templates ask for tools and documents with `is not none`, as transformers always passes both.
    names = {"tools": None, "documents": None, "add_generation_prompt": True, **task["variables"]}
    try:
        template = environment.from_string(task["template"])
        return {"texts": [_rendered(template, each, names, task["most"]) for each in task["conversations"]]}
    except Exception as error:  # whatever a template does wrong
        line = getattr(error, "lineno", None)  # of a syntax error
        where = "" if line is None else f"line {line}: "
        return {"error": f"{where}{type(error).__name__}: {str(error)[:1000]}"}


def _rendered(template: Any, messages: list[dict[str, str]], names: dict[str, Any], most: int) -> str:
    pieces, length = list[str](), 0
    for piece in template.generate(messages=messages, **names):
        length += len(piece)
        if length > most:
            raise ValueError(f"its text is longer than {most} characters")
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # refuses half a surrogate pair, which only an escape in a template can write
    return text


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

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, and has other arguments than that of transformers.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

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


def _limit(memory: int, seconds: int) -> None:
    import resource

    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _main() -> None:
    task = json.load(sys.stdin.buffer)
    # This Python knows its own library only, whatever environment the parent runs in.
    sys.path += task["paths"]
    import jinja2.sandbox  # noqa: F401 -- before memory is limited

    _limit(task["memory"], task["seconds"])
    json.dump(render_task(task), sys.stdout)  # ASCII


if __name__ == "__main__":
    _main()
