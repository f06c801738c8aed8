"""Files and directories that commands write: - is standard output or refused, and never a file of that name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from bundle_helpers import invoke
from q6k_convert.cli.main import app
from q6k_convert.cli.options import parse_output, parse_output_or_stdout
from q6k_convert.errors import UsageError
from q6k_convert.run.conversation import Conversation
from q6k_convert.run.places import STDOUT

READ = {
    ("generate", "prompts"),
    ("perplexity", "file"),
    *((command, "tokenizer") for command in ("generate", "chat", "perplexity")),
}
"""Paths that commands read."""
WRITTEN = {
    ("convert", "output"): ("model.gguf", "-"),
    ("verify", "report"): ("out", "--report", "-"),
    ("export", "target"): ("out", "-"),
    ("build-ops", "out"): ("--out", "-"),
    ("ci", "out"): ("model.gguf", "-"),
}
"""Paths that commands write, and what gives - for them."""


def paths_of_commands() -> dict[tuple[str, str], Any]:
    """Return what parses each path of each command: None, where it is any."""
    found = dict[tuple[str, str], Any]()
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if Path in {hint, *get_args(hint), *(each for of in get_args(hint) for each in get_args(of))}:
                (given,) = hint.__metadata__
                found[command.callback.__name__.replace("_", "-"), name] = given.parser
    return found


def test_every_path_is_read_or_has_the_rule_for_outputs() -> None:
    found = paths_of_commands()
    assert {each for each, parser in found.items() if parser is None} == READ
    assert {each for each, parser in found.items() if parser is parse_output} == set(WRITTEN)
    assert {each for each, parser in found.items() if parser is parse_output_or_stdout} == {("generate", "out")}


@pytest.mark.parametrize("place", WRITTEN, ids="-".join)
def test_what_cannot_be_a_stream_is_refused(
    place: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [place[0], *WRITTEN[place]])
    assert done.exit_code == 2
    assert "'-': this is not written to standard output" in " ".join(done.stderr.replace("│", " ").split())
    assert not [*tmp_path.iterdir()]


def test_a_file_may_have_that_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (parse_output_or_stdout("-"), parse_output_or_stdout("./-")) == (STDOUT, tmp_path / "-")
    assert parse_output("a/-") == Path("a/-")
    assert invoke(model, "./-").exit_code == 0
    assert (tmp_path / "-" / "bundle.json").is_file()
    done = invoke("inspect", "-", "--json")
    assert json.loads(done.stdout)["path"] == "-"


def test_messages_of_a_chat_are_not_saved_to_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    conversation = Conversation(None)
    with pytest.raises(UsageError, match="/save '-': this is not written to standard output"):
        conversation.message("/save -")
    assert not [*tmp_path.iterdir()]
    conversation.message("/save ./-")
    assert json.loads((tmp_path / "-").read_text()) == {"messages": []}
