"""`q6k-convert generate --prompts FILE --out FILE`: each line's answer, resuming, what is wrong by line number."""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from click.testing import Result
from typer.testing import CliRunner

from bundle_helpers import failed, invoke
from q6k_convert.cli.main import app
from q6k_convert.run import answer_lines
from q6k_convert.run import prompts_command as rooms
from q6k_convert.run.answer_lines import AnswerStream
from q6k_convert.run.prompt_lines import PromptLine
from q6k_convert.run.prompts_command import MOST_TEXTS, TEXTS_ON_CPU
from q6k_kernels.generate import texts
from q6k_kernels.generate.checking import NotFiniteError
from q6k_kernels.models.architecture import attach
from q6k_kernels.models.registry import ARCHITECTURES
from tiny_bundle import TinyBundle, tiny_bundle

LINES: list[dict[str, Any]] = [
    {"prompt": "The dog", "max_new_tokens": 40, "id": 7},
    {"prompt": "The", "temperature": 0.9, "top_k": 9, "seed": 3},
    {"messages": [{"role": "user", "content": "a dog"}], "max_new_tokens": 2},
    {"prompt": "dog The", "temperature": 0.7, "repeat_penalty": 1.2, "id": {"of": ["any", None]}},
    {"prompt": "ran"},
]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    found = tiny_bundle(tmp_path, monkeypatch)
    attach(found.model, ARCHITECTURES["llama"])
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", LINES)


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


def test_answers_are_those_of_each_prompt_alone(tiny: TinyBundle, prompts: Path) -> None:
    """In the order of the lines, though the first is the last to end."""
    done = run(tiny, prompts, "--texts", "2", "--json")
    assert done.exit_code == 0, done.stderr
    document, found = json.loads(done.stdout), answers(prompts)
    assert "answering 5 lines, 2 at once" in done.stderr
    assert [answer["line"] for answer in found] == [1, 2, 3, 4, 5]
    assert [answer.get("id") for answer in found] == [7, None, None, {"of": ["any", None]}, None]
    assert "id" not in found[1]
    for number, (line, answer) in enumerate(zip(LINES, found, strict=True)):
        given = ("-p", line.get("prompt", "a dog"), *(["--chat"] if "messages" in line else []))
        options = {"max_new_tokens": 12, "seed": 5 + number} | line
        for name in ("id", "prompt", "messages"):
            options.pop(name, None)
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        alone = json.loads(invoke("generate", tiny.path, *given, *words, "--device", "cpu", "--json").stdout)
        for name in ("text", "stop_reason", "stop_text", "token_ids", "prompt_tokens", "generated_tokens"):
            assert answer[name] == alone[name], (number, name)
    counts = {"lines": 5, "lines_before": 0, "lines_new": 5, "failed_lines": [], "status": "done"}
    assert counts.items() <= document.items()
    assert document["generated_tokens"] == sum(answer["generated_tokens"] for answer in found)
    assert document["tokens_per_second"] > 0


def test_a_stop_text_ends_one_of_them(tiny: TinyBundle, prompts: Path) -> None:
    run(tiny, prompts)
    before = [answer["text"] for answer in answers(prompts)]
    stop = before[0][4:7]
    prompts.with_name("answers.jsonl").unlink()
    written(prompts, [LINES[0] | {"stop": [stop, "\0"]}, *LINES[1:]])
    run(tiny, prompts)
    found = answers(prompts)
    assert (found[0]["text"], found[0]["stop_text"]) == (before[0][: before[0].index(stop)], stop)
    assert found[0]["stop_reason"] == "stop"
    assert [answer["text"] for answer in found[1:]] == before[1:]


def test_what_is_there_is_not_done_again(tiny: TinyBundle, prompts: Path) -> None:
    assert run(tiny, prompts).exit_code == 0
    out = prompts.with_name("answers.jsonl")
    whole = out.read_bytes()
    tiny.asked.clear()
    again = run(tiny, prompts, "--json")
    assert not tiny.asked  # no model was loaded
    assert json.loads(again.stdout)["lines_new"] == 0
    assert out.read_bytes() == whole
    # Torn within its last line, by hand even in a file that was whole: then it is not any more, until it is again.
    rows = whole.splitlines(keepends=True)
    for name, kept, torn in (
        ("answers.jsonl", rows[:3], rows[3][:-1]),
        ("answers.jsonl.part", [rows[4], rows[2]], b'{"line": 4'),
        ("answers.jsonl.part", [], b""),
    ):
        out.unlink()
        out.with_name(name).write_bytes(b"".join(kept) + torn)
        done = run(tiny, prompts, "--json")
        document = json.loads(done.stdout)
        assert (document["lines_before"], document["lines_new"]) == (len(kept), 5 - len(kept))
        assert (f"dropped a torn last line of {len(torn)} B" in done.stderr) == (torn != b"")
        assert out.read_bytes() == whole
        assert not [*out.parent.glob("answers.jsonl.*")]
    # Lines that were added are answered, and nothing else.
    written(prompts, [*LINES, {"prompt": "The"}])
    assert json.loads(run(tiny, prompts, "--json").stdout)["lines_new"] == 1
    assert out.read_bytes().startswith(whole)
    assert len(answers(prompts)) == 6


def test_an_interrupted_run_goes_on_where_it_was(
    tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, prompts)
    out = prompts.with_name("answers.jsonl")
    whole = out.read_bytes()
    out.unlink()
    put = answer_lines.AnswerFile.put

    def interrupted(self: answer_lines.AnswerFile, number: int, answer: dict[str, Any]) -> None:
        put(self, number, answer)
        if len(self) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(answer_lines.AnswerFile, "put", interrupted)
    stopped = run(tiny, prompts, "--texts", "2")
    assert stopped.exit_code == 130
    assert not out.exists()
    part = out.with_name("answers.jsonl.part").read_bytes()
    rows = part.splitlines(keepends=True)
    assert [json.loads(row)["line"] for row in rows] == [2, 3]  # the first takes longer
    assert set(rows) < set(whole.splitlines(keepends=True))
    monkeypatch.setattr(answer_lines.AnswerFile, "put", put)
    assert run(tiny, prompts, "--texts", "3").exit_code == 0
    assert out.read_bytes() == whole


def test_answers_and_prompts_of_a_pipe(tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the file, each as soon as those before it are there; nothing is kept."""
    run(tiny, prompts)
    whole = prompts.with_name("answers.jsonl").read_text()
    monkeypatch.chdir(prompts.parent)
    before, counts = {*Path().iterdir()}, list[int]()
    put = AnswerStream.put

    def watch(self: AnswerStream, number: int, answer: dict[str, Any]) -> None:
        put(self, number, answer)
        counts.append(self._shown)

    monkeypatch.setattr(AnswerStream, "put", watch)
    given = (tiny.path, "--prompts", "-", "--out", "-", "--max-new-tokens", 12, "--seed", 5, "--device", "cpu")
    arguments = [str(each) for each in ("generate", *given, "--texts", 2)]
    done = CliRunner().invoke(app, arguments, input=prompts.read_bytes())
    assert (done.exit_code, done.stdout) == (0, whole)
    assert "standard output: 5 lines, 5 of them new" in done.stderr
    assert counts == [0, 0, 0, 0, 5]  # the first takes longer
    done = CliRunner().invoke(app, arguments, input=b'{"prompt": ')
    failed(done, 3, "standard input: line 1: no JSON", "Correct")
    assert {*Path().iterdir()} == before


def test_a_line_that_fails_is_in_the_pipe_too(
    tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(logits: torch.Tensor, dtype: torch.dtype) -> None:
        raise NotFiniteError("the logits are no numbers", "")

    monkeypatch.setattr(texts, "check_finite", check)
    done = run(tiny, prompts, "--out", "-")
    assert done.exit_code == 3
    assert [json.loads(row)["error"] for row in done.stdout.splitlines()] == 5 * ["the logits are no numbers"]
    assert "5 lines failed, see `error` there: 1, 2, 3, 4, 5" in done.stderr


WRONG = {
    '{"prompt": ': "no JSON: ",
    "": "it is empty",
    '["x"]': "expected an object, found ['x']",
    '{"text": "x"}': "'text' is no key; known are prompt, messages, id",
    '{"id": 1}': "expected one of prompt and messages",
    '{"prompt": 3}': "prompt: expected a text, found 3",
    '{"prompt": "\\ud800"}': "prompt: no Unicode at character 0",
    '{"prompt": "x", "top_k": 1.5}': "top_k: expected a whole number of 0 to 16777216, found 1.5",
    '{"prompt": "x", "temperature": true}': "temperature: expected a number of 0 to 100, found True",
    '{"prompt": "x", "seed": -1}': "seed: expected a whole number of 0 to 4294967295, found -1",
    '{"prompt": "x", "stop": ["a", ""]}': "stop: a stop text is empty",
    '{"messages": []}': "messages: expected a list of one or more",
    '{"messages": [{"role": "tool", "content": "x"}]}': "messages: expected role, one of system, user",
    '{"messages": [{"role": "user", "content": 1}]}': "content: expected a text, found 1",
    '{"prompt": "x", "max_new_tokens": 299}': "3 tokens of prompt and 299 new ones are 302, and the",
}


def test_lines_that_are_wrong_are_named(tiny: TinyBundle, prompts: Path) -> None:
    """All of them by one run, before the model is loaded."""
    good = prompts.read_text().splitlines()
    for line, words in WRONG.items():
        prompts.write_text("\n".join([good[0], line, good[1], line]) + "\n")
        failed(run(tiny, prompts), 3, f"prompts.jsonl: line 2: {words}", "nothing has been written")
    done = run(tiny, prompts)
    assert "(1 more line wrong: 4)" in done.stderr
    prompts.write_text("\n".join(["[]"] * 13))
    assert "(12 more lines wrong: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)" in run(tiny, prompts).stderr
    assert [*prompts.parent.glob("answers*")] == []
    assert not tiny.asked


def test_files_that_make_no_sense(tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny, prompts)
    out, part = (prompts.with_name(name) for name in ("answers.jsonl", "answers.jsonl.part"))
    whole = out.read_bytes()
    other = "line 1 is no answer of this model to one of these prompts, with these settings"
    computed = ("--cache", "int8"), ("--dtype", "bf16"), ("--activations", "bf16")
    for option in (("--temperature", "0.5"), *computed):
        failed(run(tiny, prompts, *option), 4, other, "another --out")
    with monkeypatch.context() as patch:
        encoded = PromptLine.encoded
        patch.setattr(PromptLine, "encoded", lambda line, by: [*encoded(line, by), 3])
        failed(run(tiny, prompts), 4, other, "another --out")
    written(prompts, LINES[:4])
    failed(run(tiny, prompts), 4, f"answers.jsonl: {other.replace('1', '5', 1)}", "another --out")
    written(prompts, LINES)
    part.touch()
    failed(run(tiny, prompts), 4, "answers.jsonl.part both exist", "Remove")
    out.unlink()
    with part.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        failed(run(tiny, prompts), 4, "another run is writing it", "Wait until it ends, or give another")
    for wrong in (b"x\n", b"[]\n", b'{"line": 1}\n', b'{"line": "1"}\n'):
        part.write_bytes(wrong + whole)
        failed(run(tiny, prompts), 4, f"answers.jsonl.part: {other}", "another --out")
        assert part.read_bytes() == wrong + whole
    part.write_bytes(whole + whole)
    failed(run(tiny, prompts), 4, f"answers.jsonl.part: {other.replace('1', '6', 1)}", "another --out")
    failed(run(tiny, part.with_name("none.jsonl")), 4, "none.jsonl: No such file", "Check")
    prompts.write_bytes(b"")
    failed(run(tiny, prompts), 3, "the file is empty", '{"prompt": "Once"}')
    monkeypatch.setattr("q6k_convert.run.prompt_lines.MAX_LINE_BYTES", 30)
    prompts.write_text('{"prompt": "x"}\n' + '{"prompt": "' + 30 * "x" + '"}\n' + "no\n")
    failed(run(tiny, prompts), 3, "line 2: longer than 30 B", "Correct")


def test_what_has_the_name_of_the_answers_stays(
    tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory, a device, a link to nothing, and what appears while answers are made, which stay in .part."""
    monkeypatch.chdir(prompts.parent)
    Path("link").symlink_to("nothing")
    for path in (".", "..", prompts.parent, "/dev/null", "link"):
        failed(run(tiny, prompts, "--out", path), 4, f"{path}: expected a regular file", "another --out")
    assert not tiny.asked
    run(tiny, prompts)
    out, part = (prompts.with_name(name) for name in ("answers.jsonl", "answers.jsonl.part"))
    whole = out.read_bytes()
    out.unlink()
    put = answer_lines.AnswerFile.put

    def watch(self: answer_lines.AnswerFile, number: int, answer: dict[str, Any]) -> None:
        put(self, number, answer)
        out.write_text("of somebody else")

    with monkeypatch.context() as patch:
        patch.setattr(answer_lines.AnswerFile, "put", watch)
        words = f"{out} appeared while it was made; all answers are in answers.jsonl.part"
        failed(run(tiny, prompts), 4, words, "Move it away")
    assert (out.read_text(), part.read_bytes()) == ("of somebody else", whole)
    out.unlink()
    assert json.loads(run(tiny, prompts, "--json").stdout)["lines_new"] == 0
    assert (out.read_bytes(), part.exists()) == (whole, False)


def test_options_that_do_not_go_together(tiny: TinyBundle, prompts: Path) -> None:
    for more, words in (
        (("--prompt", "x"), "--prompt and --prompts are both given"),
        (("--system", "x"), "--system needs --chat"),
        (("--logprobs", "1"), "--logprobs is for one --prompt"),
        (("--out", prompts), "--prompts and --out are the same file"),
        (("--context", "400"), "the model knows 300 positions"),
        (("--stop", ""), "a stop text is empty"),
        (("--out", "-", "--json"), "--out - and --json both write to standard output"),
    ):
        assert words in (done := run(tiny, prompts, *more)).stderr
        assert done.exit_code == 2
    for given in (("--prompts", prompts), ("--out", prompts), ("-p", "x", "--texts", "2")):
        failed(invoke("generate", tiny.path, *given), 2, "--prompts, --out and --texts belong together", "Give")
    assert not tiny.asked


def test_a_line_that_fails_does_not_stop_the_others(
    tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, prompts)
    before = answers(prompts)
    prompts.with_name("answers.jsonl").unlink()
    seen = list[int]()

    def check(logits: torch.Tensor, dtype: torch.dtype) -> None:
        seen.append(0)
        if len(seen) in (1, 4):
            raise NotFiniteError("the logits are no numbers", "")

    with monkeypatch.context() as patch:
        patch.setattr(texts, "check_finite", check)
        done = run(tiny, prompts, "--texts", "2", "--json")
    assert done.exit_code == 3
    document, found = json.loads(done.stdout), answers(prompts)
    assert (document["status"], document["failed_lines"]) == ("failed", [1, 4])
    assert "2 lines failed, see `error` there: 1, 4" in done.stderr
    assert [found[at] for at in (1, 2, 4)] == [before[at] for at in (1, 2, 4)]
    assert (found[0]["id"], found[0]["error"]) == (7, "the logits are no numbers")


def test_lines_that_failed_are_tried_again(
    tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is whole and of one that is not; by a run that may be interrupted, and others are not."""
    run(tiny, prompts)
    out, part = (prompts.with_name(name) for name in ("answers.jsonl", "answers.jsonl.part"))
    whole = out.read_bytes()
    good = whole.splitlines(keepends=True)

    def fails(number: int, reason: str) -> bytes:
        row = {"line": number, "error": reason, "request": json.loads(good[number - 1])["request"]}
        return json.dumps(row).encode() + b"\n"

    one, three, other = fails(1, "NaN"), fails(3, "NaN"), fails(3, "infinite")
    for path, rows, there, told in (
        (out, [one, good[1], three, *good[3:]], 3, "2 lines"),
        (part, [good[4], three, one, good[0]], 2, "1 line"),  # as left by a run that tried again until interrupted
        (part, [three, other, good[1]], 1, "1 line"),
        (part, [three, one, good[2]], 1, "1 line"),
    ):
        out.unlink()
        path.write_bytes(b"".join(rows))
        done = run(tiny, prompts, "--json")
        assert done.exit_code == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["lines_before"], document["lines_new"]) == (there, 5 - there)
        assert f": {told} that failed: tried again" in done.stderr
        assert out.read_bytes() == whole
        assert not part.exists()
    # Another error takes the place of the first.
    out.write_bytes(b"".join([one, *good[1:]]))
    with monkeypatch.context() as patch:
        patch.setattr(
            texts, "check_finite", lambda logits, dtype: (_ for _ in ()).throw(NotFiniteError("again", ""))
        )
        assert run(tiny, prompts).exit_code == 3
    assert [row.get("error") for row in answers(prompts)] == ["again", None, None, None, None]
    assert out.read_bytes().splitlines(keepends=True)[1:] == good[1:]
    # A line with an answer has no other.
    part.write_bytes(b"".join([good[0], one]))
    out.unlink()
    failed(run(tiny, prompts), 4, "line 2 is no answer of this model", "another --out")


def test_progress_is_told(tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "NOTE_SECONDS", 0.0)
    done = run(tiny, prompts, "--texts", "2")
    assert "answers: 0 of 5 lines; " in done.stderr
    assert "answers: 4 of 5 lines; " in done.stderr
    assert " tokens/s, " in done.stderr
    assert "5 lines, 5 of them new; " in done.stderr


def test_a_chat_has_its_system_message(tiny: TinyBundle, prompts: Path) -> None:
    written(prompts, [{"prompt": "The dog"}, {"messages": [{"role": "user", "content": "The dog"}]}])
    run(tiny, prompts, "--chat", "--system", "be brief")
    alone = ("generate", tiny.path, "-p", "The dog", "--chat", "--device", "cpu", "--json")
    expected = [json.loads(invoke(*alone, *more).stdout) for more in (("--system", "be brief"), ())]
    assert [each["prompt_tokens"] for each in answers(prompts)] == [each["prompt_tokens"] for each in expected]


@pytest.mark.parametrize(
    ("free", "places"), [(None, TEXTS_ON_CPU), (10_000, MOST_TEXTS), (0, 1), (105, 1), (145, 4), (420, 28)]
)
def test_as_many_at_once_as_memory_allows(free: int | None, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights take 90 bytes, a prompt 10, each text's cache 10; a tenth stays free."""
    monkeypatch.setattr(rooms, "free_bytes", lambda device: free)
    memory = {"weights_bytes": 90, "prompt_bytes": 10, "cache_bytes": 10}
    opened: Any = SimpleNamespace(device=None, memory=lambda context: memory)
    assert rooms._places(opened, 100) == places
