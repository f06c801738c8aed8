"""Files of answers of `generate --prompts`: resuming, trying again, what else has their names."""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from bundle_helpers import failed
from prompt_runs import LINES, answers, run, written
from q6k_convert.run import answer_lines
from q6k_convert.run.prompt_lines import PromptLine
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
    Path("loop").symlink_to("loop")
    for path in (".", "..", "/", prompts.parent, "/dev/null", "link", "loop"):
        failed(run(tiny, prompts, "--out", path), 4, f"{path}: expected a regular file", "another --out; - is")
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


def test_a_link_to_the_answers_stays_one(tiny: TinyBundle, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are whole, have lines to come, or are in another order; as does /dev/stdout that is a file."""
    run(tiny, prompts)
    out, part, link = (prompts.with_name(name) for name in ("answers.jsonl", "answers.jsonl.part", "link"))
    whole = out.read_bytes()
    rows = whole.splitlines(keepends=True)
    link.symlink_to(out.name)
    for name, kept in ((out, rows), (out, rows[:2]), (part, [rows[3], rows[0]]), (out, [])):
        out.unlink()
        name.write_bytes(b"".join(kept))
        assert json.loads(run(tiny, prompts, "--out", link, "--json").stdout)["lines_before"] == len(kept)
        assert link.is_symlink()
        assert (out.read_bytes(), {*prompts.parent.glob("answers*"), *prompts.parent.glob("link*")}) == (
            whole,
            {out, link},
        )


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
