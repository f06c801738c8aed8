"""The messages of a chat, and the commands that change them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from q6k_convert.errors import IOFailedError, UsageError
from q6k_convert.run import places

Message = dict[str, str]
COMMANDS = SimpleNamespace(help="/help", system="/system", reset="/reset", save="/save", end="/exit")
HELP = (
    "/help          list the commands",
    "/system TEXT   put this system message before the chat from now on; without TEXT, none",
    "/reset         forget all messages but the system message",
    "/save FILE     write the messages to a new JSON file, or again to one that this chat has written",
    "/exit          end the chat, as Ctrl-D does",
    "//TEXT         send a message that begins with /",
    "A line that ends in \\ goes on in the next one. Ctrl-C stops an answer; what there is of it stays.",
)


@dataclass(frozen=True)
class Shown:
    """What a command has to say."""

    lines: tuple[str, ...]


class Conversation:
    """The messages so far.

    Attributes:
        system: the system message, or None.
    """

    def __init__(self, system: str | None) -> None:
        self.system = system
        self._turns = list[Message]()
        self._saved = set[Path]()

    @property
    def messages(self) -> list[Message]:
        """All messages, each with `role` and `content`."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self._turns]

    def asked(self, message: str) -> list[Message]:
        """Return all messages with one more by the user."""
        return [*self.messages, {"role": "user", "content": message}]

    def add(self, message: str, answer: str) -> None:
        """Add a message and its answer."""
        self._turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]

    def message(self, given: str) -> str | Shown:
        """Return the message that was typed, or what a command says after it was run.

        Raises:
            UsageError: there is no such command, or it lacks something.
            IOFailedError: the file cannot be written, or exists.
        """
        if given.startswith("//"):
            return given[1:]
        if not given.startswith("/"):
            return given
        name, _, rest = given.strip().partition(" ")
        rest = rest.strip()
        if name == COMMANDS.help:
            return Shown(HELP)
        if name == COMMANDS.system:
            self.system = rest or None
            return Shown(("there is a new system message" if rest else "there is no system message",))
        if name == COMMANDS.reset:
            self._turns.clear()
            return Shown(("all messages are forgotten",))
        if name == COMMANDS.save:
            return Shown((f"saved to {self._save(rest)}",))
        raise UsageError(
            f"there is no command {name}", "/help lists them; //TEXT sends a message that begins with /."
        )

    def _save(self, name: str) -> Path:
        if not name:
            raise UsageError("/save needs the name of a file", "Give one: /save FILE.")
        if "\0" in name:
            raise UsageError("the name of a file has no NUL", "Give another one: /save FILE.")
        try:
            path = places.output(name).expanduser()
        except ValueError as error:
            raise UsageError(f"/save {error}", "Give a name: /save FILE.") from error
        except RuntimeError as error:
            raise UsageError(f"{name}: there is no such home directory", "Give the whole path.") from error
        content = json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False) + "\n"
        try:
            with path.open("w" if path.resolve() in self._saved else "x", encoding="utf-8") as file:
                self._saved.add(path.resolve())  # also if the rest fails, so that another /save can write it
                file.write(content)
        except FileExistsError as error:
            raise IOFailedError(f"{path} exists already", "Give another name.") from error
        except OSError as error:
            raise IOFailedError(
                f"{path}: {error.strerror or error}", "Check the path and its permissions."
            ) from error
        return path
