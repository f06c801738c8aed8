"""`q6k-convert generate --prompts FILE --out FILE`: each line's answer, what is wrong by line number, pipes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from typer.testing import CliRunner

from bundle_helpers import failed, invoke
from prompt_runs import LINES, answers, run, written
from q6k_convert.cli.main import app
from q6k_convert.run import prompts_command as rooms
from q6k_convert.run.answer_lines import AnswerStream
from q6k_convert.run.prompts_command import MOST_TEXTS, TEXTS_ON_CPU
from q6k_kernels.generate import texts
from q6k_kernels.generate.checking import NotFiniteError
from q6k_kernels.models.architecture import attach
from q6k_kernels.models.registry import ARCHITECTURES
from tiny_bundle import TinyBundle, tiny_bundle


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    found = tiny_bundle(tmp_path, monkeypatch)
    attach(found.model, ARCHITECTURES["llama"])
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", LINES)


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
