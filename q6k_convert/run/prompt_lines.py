"""A file of prompts: a JSON object in each line, and what is wrong with it by line number.

A line has a text to continue, `prompt`, or `messages`, each with `role` and `content`, to answer in the model's
chat template. It may have an `id`, any JSON, which its answer repeats, and settings that replace the options of the
command: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repeat_penalty`, `repeat_last`, `seed` and
`stop`, a text or a list of texts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import InputRejectedError
from q6k_convert.run.places import STDIN, named
from q6k_kernels.bundle.parsing import parse
from q6k_kernels.errors import ModelError
from q6k_kernels.text import shortened

if TYPE_CHECKING:
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

MAX_LINE_BYTES = 1 << 24
MOST_NAMED = 10
"""Most lines that an error names."""
_ROLES = ("system", "user", "assistant")
_SETTINGS: dict[str, tuple[type, float, float]] = {
    "max_new_tokens": (int, 1, 1 << 24),
    "temperature": (float, 0, 100),
    "top_k": (int, 0, 1 << 24),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repeat_penalty": (float, 0.01, 100),
    "repeat_last": (int, -1, 1 << 24),
    "seed": (int, 0, (1 << 32) - 1),
}
"""Settings of a line: kind and range, those of the options of the same names."""
_KEYS = ("prompt", "messages", "id", *_SETTINGS, "stop")


@dataclass(frozen=True)
class LineDefaults:
    """What holds for lines that do not say otherwise.

    Attributes:
        settings: the settings by name, with `max_new_tokens`; `seed` is that of the first line, and grows by one
            with each line.
        stop: texts that end an answer.
        chat: whether a prompt is sent as a user's message.
        system: system message before such a prompt, or None.
    """

    settings: dict[str, Any]
    stop: tuple[str, ...]
    chat: bool
    system: str | None


@dataclass(frozen=True)
class PromptLine:
    """A line.

    Attributes:
        number: its number, from 1 on.
        given: the object.
        messages: messages to answer; None if `prompt` is a text to continue.
        prompt: text to continue, or "".
        settings: its settings by name.
        stop: texts that end its answer.
    """

    number: int
    given: dict[str, Any]
    messages: list[dict[str, str]] | None
    prompt: str
    settings: dict[str, Any]
    stop: tuple[str, ...]

    @property
    def limit(self) -> int:
        """The most tokens of its answer."""
        return int(self.settings["max_new_tokens"])

    def encoded(self, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens of its prompt.

        Raises:
            TokenizerError: the messages do not fit the chat template.
        """
        return tokenizer.encode(self.prompt) if self.messages is None else tokenizer.encode_chat(self.messages)

    def digest(self, model: str) -> str:
        """Return 16 hexadecimal digits of what its answer depends on: prompt, settings; not the machine.

        Args:
            model: the model, and how it computes.
        """
        content = [model, self.messages, self.prompt, self.settings, self.stop, self.given.get("id")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class LineProblems:
    """What is wrong with lines of a file, gathered so that one run names all of them.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._name, self._found = named(path, "standard input"), list[tuple[int, str]]()

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Note what is wrong with a line, if anything is."""
        try:
            yield
        except ModelError as error:
            self._found.append((number, error.cause))
        except ValueError as error:
            self._found.append((number, str(error)))

    def check(self) -> None:
        """Raise InputRejectedError if a line is wrong."""
        if not self._found:
            return
        number, cause = self._found[0]
        others = [str(each) for each, _ in self._found[1:]]
        named = ", ".join(others[:MOST_NAMED]) + (", …" if len(others) > MOST_NAMED else "")
        more = f" ({text.plural(len(others), 'more line')} wrong: {named})" if others else ""
        raise InputRejectedError(
            f"{self._name}: line {number}: {cause}{more}", "Correct the file; nothing has been written."
        )


def read_lines(path: Path, defaults: LineDefaults) -> list[PromptLine]:
    """Read a file of prompts, or `STDIN`.

    Raises:
        InputRejectedError: it has no lines, or lines that are wrong.
        OSError: it cannot be read.
    """
    found, problems = list[PromptLine](), LineProblems(path)
    with nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb") as file:
        for number in count(1):
            row = file.readline(MAX_LINE_BYTES + 1)
            if not row:
                break
            with problems.of(number):
                if len(row) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {text.size(MAX_LINE_BYTES)}")
                found.append(_line(number, row, defaults))
            if len(row) > MAX_LINE_BYTES:
                break  # what follows is the rest of the line
    problems.check()
    if not found:
        name = named(path, "standard input")
        raise InputRejectedError(f"{name}: the file is empty", 'Give it lines like {"prompt": "Once"}.')
    return found


def _line(number: int, row: bytes, defaults: LineDefaults) -> PromptLine:
    """Parse a line; raise ValueError with what is wrong."""
    if not row.strip():
        raise ValueError("it is empty")
    try:
        given = parse(row)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"expected an object, found {shortened(given)}")
    if unknown := [key for key in given if key not in _KEYS]:
        raise ValueError(f"{shortened(unknown[0])} is no key; known are {', '.join(_KEYS)}")
    if ("prompt" in given) == ("messages" in given):
        raise ValueError("expected one of prompt and messages")
    settings = dict(defaults.settings)
    settings["seed"] = (settings["seed"] + number - 1) % (1 << 32)
    settings |= {name: _setting(name, given[name]) for name in _SETTINGS if name in given}
    messages, prompt = None, ""
    if "messages" in given:
        messages = _messages(given["messages"])
    elif defaults.chat:
        system = [] if defaults.system is None else [{"role": "system", "content": defaults.system}]
        messages = [*system, {"role": "user", "content": _text("prompt", given["prompt"])}]
    else:
        prompt = _text("prompt", given["prompt"])
    stop = given.get("stop", list(defaults.stop))
    texts = [_text("stop", each) for each in (stop if isinstance(stop, list) else [stop])]
    if not all(texts):
        raise ValueError("stop: a stop text is empty")
    return PromptLine(number, given, messages, prompt, settings, tuple(texts))


def _setting(name: str, value: Any) -> float:
    kind, least, most = _SETTINGS[name]
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}: expected {what} of {least} to {most}, found {shortened(value)}")
    number: float = kind(value)
    return number


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages: expected a list of one or more, found {shortened(value)}")
    for each in value:
        if not isinstance(each, dict) or each.keys() != {"role", "content"} or each["role"] not in _ROLES:
            raise ValueError(
                f"messages: expected role, one of {', '.join(_ROLES)}, and content; found {shortened(each)}"
            )
        _text("content", each["content"])
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, found {shortened(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: no Unicode at character {error.start}") from error
    return value
