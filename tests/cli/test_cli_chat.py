"""`q6k-convert chat`: turns, commands, interruptions, and what it keeps from one turn to the next."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from click.testing import Result
from typer.testing import CliRunner

import families
from bundle_helpers import failed
from q6k_convert.cli.main import app
from q6k_convert.cli.typed import MAX_LINE_BYTES, TypedMessages
from q6k_convert.errors import IOFailedError
from q6k_convert.run.answering import Answering
from q6k_convert.run.conversation import Conversation
from q6k_kernels.generate import kv_cache
from q6k_kernels.generate.generator import Generator
from q6k_kernels.tokenizer.text_tokenizer import TextStream, Tokenizer
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from tiny_bundle import TinyBundle, ids_of, tiny_bundle


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    return tiny_bundle(tmp_path, monkeypatch)


def chat(tiny: TinyBundle, given: str | bytes, *options: str | Path) -> Result:
    arguments = ["chat", tiny.path, "--device", "cpu", "--max-new-tokens", "8", *options]
    return CliRunner().invoke(app, [str(each) for each in arguments], input=given)


def document_of(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rendered(messages: list[tuple[str, str]]) -> list[int]:
    return ids_of("".join(f"{role}: {text}\n" for role, text in messages))


def test_steps_are_prepared_for_all_that_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a long conversation would wait for them in the middle of an answer, on a GPU."""
    monkeypatch.setitem(kv_cache.FEW_SLOTS, "model", 96)
    model, tokenizer = families.tiny("llama"), cast("Tokenizer", SimpleNamespace(stop_ids=frozenset()))
    for capacity, reaches in ((1, set()), (96, {96}), (200, {96, 200})):
        generator = Generator(model, capacity=capacity, fused=True)
        Answering(generator, tokenizer, model, (), print).prepare([0])
        assert generator.length == 0
        assert {reach for reach, _ in generator._recorder.made} == reaches


class Script:
    """Messages typed at a terminal; what is callable is called in the place of typing."""

    interactive = True

    def __init__(self, *steps: Any) -> None:
        self._steps = list(steps)

    def __call__(self, **_: Any) -> Script:
        return self

    def read(self) -> str | None:
        if not self._steps:
            return None
        step = self._steps.pop(0)
        return step() if callable(step) else step


@pytest.fixture
def typed(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*steps: Any, options: tuple[str, ...] = ()) -> Result:
        monkeypatch.setattr("q6k_convert.cli.typed.TypedMessages", Script(*steps))
        return chat(tiny, "", *options)

    return run


def interrupt() -> str:
    signal.raise_signal(signal.SIGINT)
    return "never"


def test_each_turn_sees_all_before_and_processes_only_what_is_new(tiny: TinyBundle) -> None:
    document = document_of(chat(tiny, "The dog\nAnd the fox?\n", "--system", "be brief", "--json"))
    tokenizer, said = load_tokenizer(tiny.path), [("system", "be brief")]
    known = list[int]()
    for question, turn in zip(("The dog", "And the fox?"), document["turns"], strict=True):
        said.append(("user", question))
        ids = rendered(said)
        answer = tiny.best(ids, 8)
        said.append(("assistant", tokenizer.decode(answer)))
        assert (turn["prompt_tokens"], turn["generated_tokens"], turn["stop_reason"]) == (len(ids), 8, "length")
        same = next((i for i, pair in enumerate(zip(known, ids, strict=False)) if pair[0] != pair[1]), len(known))
        assert turn["reused_tokens"] == same
        known = [*ids, *answer[:-1]]
    assert document["turns"][1]["reused_tokens"] > 0.6 * document["turns"][0]["prompt_tokens"]
    assert document["messages"] == [{"role": role, "content": text} for role, text in said]
    shown = {"status": "done", "context": 300, "temperature": 0.0, "seed": 0, "dtype": "float32", "device": "cpu"}
    assert document.items() >= shown.items()


def test_a_template_may_rewrite_earlier_turns(tiny: TinyBundle) -> None:
    """As those do that leave out what the model was thinking, or count the turns."""
    template = "{{ messages | length }}{% for m in messages if m.role == 'user' %} {{ m.content }}{% endfor %} so"
    tiny.write(chat_template=template, ggml__add_bos_token=True)
    document = document_of(chat(tiny, "The dog\nThe fox\n", "--json"))
    answers = [each["content"] for each in document["messages"] if each["role"] == "assistant"]
    tokenizer = load_tokenizer(tiny.path)
    for text, answer in zip(("1 The dog so", "3 The dog The fox so"), answers, strict=True):
        assert answer == tokenizer.decode(tiny.best(ids_of(text), 8))


def test_answers_go_to_stdout_and_all_else_to_stderr(tiny: TinyBundle) -> None:
    done = chat(tiny, "The dog\n\n/system be kind\n/help\n")
    answer = load_tokenizer(tiny.path).decode(tiny.best(rendered([("user", "The dog")]), 8))
    assert (done.exit_code, done.stdout) == (0, answer + "\n")
    for words in (
        "tokens read in",
        "answer: 8 tokens",
        "there is a new system",
        "/save FILE",
    ):
        assert words in done.stderr
    quiet = chat(tiny, "The dog\n", "--quiet")
    assert (quiet.stdout, quiet.stderr) == (answer + "\n", "")


def test_commands_change_what_the_next_turn_sees(tiny: TinyBundle, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    given = [
        "The dog",
        "/system be kind",
        f"/save {saved}",
        "/reset",
        "//x y",
        "/system",
        f"/save {saved}",
        "a\\",
        "b",
    ]
    document = document_of(chat(tiny, "\n".join([*given, "/exit", "never"]), "--json"))
    assert [each["role"] for each in document["messages"]] == ["user", "assistant"] * 2
    assert [each["content"] for each in document["messages"][::2]] == ["/x y", "a\nb"]
    assert [turn["prompt_tokens"] for turn in document["turns"][:2]] == [
        len(rendered([("user", "The dog")])),
        len(rendered([("system", "be kind"), ("user", "/x y")])),
    ]
    assert json.loads(saved.read_text()) == {"messages": document["messages"][:2]}


def test_a_file_that_a_full_disk_cut_off_can_be_saved_again(tmp_path: Path) -> None:
    chat, path = Conversation(None), tmp_path / "chat.json"
    chat.add("a", "b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(IOFailedError, match="File too large"):
            chat.message(f"/save {path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    chat.message(f"/save {path}")
    assert json.loads(path.read_text()) == {"messages": chat.messages}


def test_in_a_pipe_what_is_wrong_ends_it(tiny: TinyBundle, tmp_path: Path) -> None:
    failed(chat(tiny, "/dance\n"), 2, "there is no command /dance", "/help lists them")
    failed(chat(tiny, "/save\n"), 2, "/save needs the name of a file", "/save FILE")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    failed(chat(tiny, f"/save {taken}\n"), 4, "exists already", "another name")
    failed(chat(tiny, f"/save {tmp_path / 'none' / 'x'}\n"), 4, "No such file", "Check the path")
    failed(chat(tiny, "/save ~nobody-of-this-name/x\n"), 2, "there is no such home directory", "the whole path")
    failed(chat(tiny, "/save a\0b\n"), 2, "the name of a file has no NUL", "another one")
    assert taken.read_text() == "mine"
    failed(chat(tiny, b"caf\xe9\n"), 2, "a line on stdin is not UTF-8", "UTF-8")
    failed(chat(tiny, b"x" * (MAX_LINE_BYTES + 1)), 2, f"longer than {MAX_LINE_BYTES} bytes", "shorter")
    failed(chat(tiny, "x", "--system", "caf\udce9"), 2, "the system message is not UTF-8", "UTF-8")
    failed(chat(tiny, "x", "--context", "301"), 2, "the model knows 300 positions", "Give 300")
    long = chat(tiny, "The dog\nThe lazy dog and the quick fox\n", "--context", "24")
    failed(long, 2, "and the context holds 24", "/reset, or with more --context")
    tiny.write(chat_template="{{ '' }}", ggml__add_bos_token=False)
    failed(chat(tiny, "x"), 3, "makes no tokens of the messages", "--tokenizer DIR")
    tiny.write(chat_template=None)
    failed(chat(tiny, "x"), 3, "the model has no chat template", "--tokenizer DIR")
    tiny.write(chat_template="{{ bos_token }}\n{% for %}")
    broken = chat(tiny, "x")
    failed(broken, 3, "the chat template failed: line 2: TemplateSyntaxError", "--tokenizer DIR")
    assert "loaded" not in broken.stderr


def test_at_a_terminal_the_chat_goes_on(tiny: TinyBundle, typed: Any) -> None:
    done = typed(
        "/dance", "The dog and the quick brown fox and the lazy dog", "The", options=("--context", "20", "--json")
    )
    document = document_of(done)
    assert [each["content"] for each in document["messages"][::2]] == ["The"]
    assert "there is no command /dance" in done.stderr
    assert "and the context holds 20" in done.stderr
    assert "Ctrl-C stops an answer" in done.stderr


def test_a_full_context_ends_the_answer(tiny: TinyBundle) -> None:
    ids = rendered([("user", "The dog")])
    done = chat(tiny, "The dog\n", "--context", str(len(ids) + 3), "--json")
    turn = document_of(done)["turns"][0]
    assert (turn["generated_tokens"], turn["stop_reason"]) == (3, "length")
    assert f"the context of {len(ids) + 3} tokens is full" in done.stderr


@pytest.mark.parametrize("piped", [False, True])
def test_ctrl_c_stops_an_answer_and_keeps_the_chat(
    tiny: TinyBundle, typed: Any, monkeypatch: pytest.MonkeyPatch, piped: bool
) -> None:
    push, pushed = TextStream.push, []

    def interrupting(self: TextStream, token: int) -> str:
        pushed.append(token)
        if len(pushed) == 3:
            signal.raise_signal(signal.SIGINT)
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", interrupting)
    before = signal.getsignal(signal.SIGINT)
    done = chat(tiny, "The dog\nThe fox\n", "--json") if piped else typed("The dog", "The fox", options=("--json",))
    document = document_of(done)
    endings = [(turn["generated_tokens"], turn["stop_reason"]) for turn in document["turns"]]
    assert endings == [(3, "interrupted"), (8, "length")]
    ids = rendered([("user", "The dog")])
    assert document["messages"][1]["content"] == load_tokenizer(tiny.path).decode(tiny.best(ids, 3))
    assert "; stopped)" in done.stderr
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_while_a_prompt_is_read_forgets_the_message(
    tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, calls = Generator.resume, []

    def interrupting(self: Generator, ids: list[int]) -> Any:
        calls.append(ids)
        found = resume(self, ids)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(Generator, "resume", interrupting)
    document = document_of(chat(tiny, "The dog\nnever\nThe fox\n", "--json"))
    assert [each["content"] for each in document["messages"][::2]] == ["The dog", "The fox"]
    assert [turn["reused_tokens"] for turn in document["turns"]] == [0, 0]  # the cache held a part of the text


def test_ctrl_c_while_a_template_is_rendered_forgets_the_message(
    tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = Tokenizer.encode_chat, []

    def interrupting(self: Tokenizer, messages: Any) -> list[int]:
        calls.append(messages)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return encode(self, messages)

    monkeypatch.setattr(Tokenizer, "encode_chat", interrupting)
    done = chat(tiny, "The dog\nnever\nThe fox\n", "--json")
    document = document_of(done)
    assert [each["content"] for each in document["messages"][::2]] == ["The dog", "The fox"]
    assert document["turns"][1]["reused_tokens"] > 0
    assert "stopped before the answer; the message is forgotten" in done.stderr


def test_ctrl_c_at_the_prompt_is_answered_and_ends_it_the_second_time(typed: Any) -> None:
    done = typed(interrupt, "The dog", interrupt, options=("--json",))
    assert [each["content"] for each in document_of(done)["messages"][::2]] == ["The dog"]
    assert done.stderr.count("Ctrl-D or /exit ends the chat, as does Ctrl-C once more") == 2
    twice = typed(interrupt, interrupt)
    assert twice.exit_code == 130
    assert "interrupted (SIGINT)" in twice.stderr


def test_two_signals_in_an_answer_end_it(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_self: TextStream, _token: int) -> str:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return "never"

    monkeypatch.setattr(TextStream, "push", twice)
    assert chat(tiny, "The dog\n").exit_code == 130


def test_sampling_stop_texts_and_log_probabilities_are_those_of_generate(tiny: TinyBundle) -> None:
    options = ("--temperature", "1.2", "--top-k", "20", "--seed", "4", "--logprobs", "1")
    document = document_of(chat(tiny, "The dog\n", *options, "--json"))
    given = [
        "generate",
        str(tiny.path),
        "--chat",
        "-p",
        "The dog",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--json",
    ]
    one = json.loads(CliRunner().invoke(app, [*given, *options]).stdout)
    answer = document["messages"][1]["content"]
    assert answer == one["text"]
    assert [row["token_id"] for row in document["turns"][0]["logprobs"]] == one["token_ids"]
    stop = answer[3:5]
    stopped = document_of(chat(tiny, "The dog\n", *options, "--stop", stop, "--json"))
    assert stopped["messages"][1]["content"] == answer[: answer.index(stop)]
    assert stopped["turns"][0]["stop_text"] == stop


def test_lines_are_typed_with_a_prompt(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """At a terminal whose answers go elsewhere, so that the prompt goes to stderr."""
    import builtins
    import sys

    lines = iter(["one\\", "two", "caf\udce9"])

    def read(prompt: str = "") -> str:
        assert prompt == ""
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    typed = TypedMessages()
    assert typed.interactive
    assert typed.read() == "one\ntwo"
    with pytest.raises(Exception, match="not UTF-8: at character 3"):
        typed.read()
    assert typed.read() is None
    assert capsys.readouterr().err == "> . > > \n"
