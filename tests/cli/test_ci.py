"""`q6k-convert ci` on a tiny model: what it leaves behind, what it does again and what not, how it fails."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from bundle_helpers import invoke, listing
from hub_server import FakeHub, fresh
from q6k_convert.cli import main, shipping
from q6k_convert.run import sanity
from tiny_models import Q8_0, Tiny
from tokenizer_files import sentencepiece, sentencepiece_ids

ROOT = Path(__file__).parents[2]
PROMPT = "The lazy fox runs over the quick dog."
LOOSE = ("--prompt", PROMPT, "--max-new-tokens", "8", "--max-perplexity", "1e9", "--max-repetition", "1")
MADE = {"bundle", "report.json", "provenance.spdx.json", "SHA256SUMS", ".ci_export.json"}
KEYS = sentencepiece()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF with a vocabulary, and the model that it was made of."""
    folder = tmp_path_factory.mktemp("tiny")
    model = Tiny(
        "llama",
        "llama",
        {"vocab_size": len(KEYS["ggml.tokens"])},
        {f"tokenizer.{key}": value for key, value in KEYS.items()},
        {"blk.0.ffn_down.weight": Q8_0},
    )
    return folder / "model.gguf", model.bundle(folder)[1]


@pytest.fixture
def gguf(tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return Path(shutil.copy2(tiny[0], tmp_path / "tiny-Q6_K.gguf"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        yield served


def export(model: Path | str, out: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """Runs it, and returns its report."""
    with pytest.raises(SystemExit) as ended:
        main.app(["ci", str(model), str(out), "--device", "cpu", *LOOSE, *options])
    assert ended.value.code == code
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}


def test_everything_is_made_once(gguf: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = export(gguf, out)
    assert {path.name for path in out.iterdir()} == MADE
    assert report["status"] == "passed"
    assert list(report["steps"]) == ["convert", "verify", "answer", "export", "provenance", "checksums"]
    states = {stage["stage"]: stage["state"] for stage in report["steps"]["verify"]["stages"]}
    assert states == dict.fromkeys(("structure", "content", "source", "device"), "passed")
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=True)
    bundle = sorted(f"bundle/{path.name}" for path in (out / "bundle").iterdir())
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in [*bundle, "provenance.spdx.json"]]
    before = times(out)
    capsys.readouterr()
    assert export(gguf, out) == report
    said = capsys.readouterr()
    assert f"nothing to do: {out} is up to date" in said.err
    assert said.out == ""
    assert times(out) == before


def test_the_same_input_gives_the_same_bytes(gguf: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(gguf, tmp_path / name)
        (tmp_path / name / ".ci_export.json").unlink()  # has the times of files
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_provenance_names_every_file_with_its_hashes(
    gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(gguf, out, "--skip", "answer", "--skip", "verify")
    document = json.loads((out / "provenance.spdx.json").read_text())
    assert (document["spdxVersion"], document["dataLicense"]) == ("SPDX-2.3", "CC0-1.0")
    assert document["creationInfo"]["created"] == "1970-01-01T00:00:00Z"
    assert "SOURCE_DATE_EPOCH was not set" in document["creationInfo"]["comment"]
    places = {f"./bundle/{path.name}": path for path in (out / "bundle").iterdir()} | {f"./{gguf.name}": gguf}
    assert {file["fileName"] for file in document["files"]} == set(places)
    for file in document["files"]:
        content = places[file["fileName"]].read_bytes()
        assert {each["algorithm"]: each["checksumValue"] for each in file["checksums"]} == {
            "SHA1": hashlib.sha1(content).hexdigest(),
            "SHA256": hashlib.sha256(content).hexdigest(),
        }
    ids = {element["SPDXID"] for element in (document, *document["packages"], *document["files"])}
    assert len(ids) == 1 + 3 + len(places)
    related = {
        (r["spdxElementId"], r["relationshipType"], r["relatedSpdxElement"]) for r in document["relationships"]
    }
    assert {end for first, _, last in related for end in (first, last)} == ids
    assert ("SPDXRef-Bundle", "GENERATED_FROM", "SPDXRef-Source") in related
    source = next(package for package in document["packages"] if package["SPDXID"] == "SPDXRef-Source")
    # One file: the hash of its hash.
    code = hashlib.sha1(hashlib.sha1(gguf.read_bytes()).hexdigest().encode()).hexdigest()
    assert source["packageVerificationCode"]["packageVerificationCodeValue"] == code
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    export(gguf, out, "--skip", "answer", "--skip", "verify")
    later = json.loads((out / "provenance.spdx.json").read_text())
    assert later["creationInfo"]["created"] == "2023-11-14T22:13:20Z"
    assert later["documentNamespace"] != document["documentNamespace"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    assert export(gguf, out, code=2)["failure"]["step"] == "provenance"


def test_a_program_is_made_where_a_gpu_is(
    gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a compiler that only writes what it is asked: tests/export/test_export.py has the real one."""
    report = export(gguf, out)
    assert report["steps"]["export"] == {"status": "left out", "reason": "--device is cpu"}
    asked = []

    def compiled(request: Any, *_: Any) -> dict[str, Any]:
        asked.append(request)
        request.target.write_bytes(b"program of " + (request.bundle / "bundle.json").read_bytes())
        return dict.fromkeys(
            ("device", "capability", "dtype", "torch", "capacity", "chunk", "bytes", "operations", "check"), 1
        )

    monkeypatch.setattr("q6k_convert.run.export_command.run", compiled)
    for turn in range(2):
        report = export(gguf, out, "--export", "always", "--capacity", "64")
        assert report["steps"]["export"]["file"] == "model.pt2"
        assert len(asked) == 1, turn
    assert asked[0].capacity == 64
    assert {path.name for path in out.iterdir()} == MADE | {"model.pt2"}
    digest = hashlib.sha256((out / "model.pt2").read_bytes()).hexdigest()
    assert f"{digest}  model.pt2\n" in (out / "SHA256SUMS").read_text()
    assert digest in (out / "provenance.spdx.json").read_text()
    # A GPU that is not used is none; and what was made for another bundle goes with it.
    export(gguf, out, "--scales", "exact", "--skip", "export")
    assert not (out / "model.pt2").exists()
    assert "model.pt2" not in (out / "SHA256SUMS").read_text() + (out / "provenance.spdx.json").read_text()
    export(gguf, out, "--export", "always")
    assert len(asked) == 2
    export(gguf, out)
    assert not (out / "model.pt2").exists()
    assert "model.pt2" not in (out / "SHA256SUMS").read_text()


@pytest.mark.parametrize("step", ["verify", "answer", "export", "provenance", "checksums"])
def test_each_step_can_be_left_out(step: str, gguf: Path, out: Path) -> None:
    report = export(gguf, out, "--skip", step)
    assert step not in report["steps"]
    assert len(report["steps"]) == 5
    assert report["skipped"] == [step]
    missing = {"provenance": "provenance.spdx.json", "checksums": "SHA256SUMS"}.get(step)
    assert {path.name for path in out.iterdir()} == MADE - {missing}
    assert step in export(gguf, out)["steps"]


def test_a_bundle_from_elsewhere_is_taken_where_converting_is_left_out(
    tiny: tuple[Path, Any], gguf: Path, out: Path
) -> None:
    shutil.copytree(tiny[0].parent / "out", out / "bundle")
    report = export(gguf, out, "--skip", "convert", "--skip", "verify")
    assert "convert" not in report["steps"]
    assert "already a bundle" in export(gguf, out, code=4)["failure"]["error"]
    assert export(gguf, out, "--force")["status"] == "passed"


def test_a_run_that_failed_is_gone_on_with(
    gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shipping.Shipping, "_provenance", fail)
        report = export(gguf, out, code=4)
    assert report["status"] == "failed"
    assert report["failure"]["step"] == "provenance"
    assert list(report["steps"]) == ["convert", "verify", "answer", "export"]
    capsys.readouterr()
    assert export(gguf, out)["status"] == "passed"
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.endswith((": begins", ": done before"))] == [
        "convert: done before", "verify: done before", "answer: done before",
        "export: done before", "provenance: begins", "checksums: begins",
    ]  # fmt: skip


class Killed(BaseException):
    """The end of a process, after which nothing is written."""


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over a bundle of other options"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_killed_around_the_conversion_is_gone_on_with(
    when: str, earlier: bool, gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("--skip", "verify", "--skip", "answer")
    if earlier:
        export(gguf, out, "--scales", "exact", *short)
    real = shipping.run_conversion

    def killed(*args: Any, **more: Any) -> None:
        if when == "after":
            real(*args, **more)
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(shipping, "run_conversion", killed)
            with pytest.raises(Killed):
                export(gguf, out, *short)
    assert export(gguf, out, *short)["status"] == "passed"


def test_a_killed_run_gives_no_right_to_replace_the_bundle_of_another(
    tiny: tuple[Path, Any], gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shipping, "run_conversion", killed)
        with pytest.raises(Killed):
            export(gguf, out)
    shutil.copytree(tiny[0].parent / "out", out / "bundle")
    assert "already a bundle" in export(gguf, out, code=4)["failure"]["error"]


def touched(gguf: Path, out: Path) -> tuple[str, ...]:
    os.utime(gguf, ns=(0, 0))
    return ()


def damaged(gguf: Path, out: Path) -> tuple[str, ...]:
    with (out / "bundle" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    return ()


def otherwise(gguf: Path, out: Path) -> tuple[str, ...]:
    return ("--scales", "exact")


@pytest.mark.parametrize("change", [touched, damaged, otherwise])
def test_what_has_changed_is_done_again(
    change: Callable[[Path, Path], tuple[str, ...]],
    gguf: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export(gguf, out)
    options = change(gguf, out)
    with monkeypatch.context() as patch:
        patch.setattr(shipping.Shipping, "_verify", lambda _: {"status": "failed"})
        failed = export(gguf, out, *options, code=5)
    # Nothing is left that speaks of the bundle before.
    assert list(failed["steps"]) == ["convert"]
    assert {path.name for path in out.iterdir()} == MADE - {"provenance.spdx.json", "SHA256SUMS"}
    capsys.readouterr()
    assert export(gguf, out, *options)["status"] == "passed"
    assert "convert: done before" in capsys.readouterr().err


def test_a_damaged_bundle_does_not_pass(gguf: Path, out: Path) -> None:
    export(gguf, out, "--skip", "answer")
    damaged(gguf, out)
    report = export(gguf, out, "--skip", "convert", "--skip", "answer", code=5)
    assert report["failure"]["step"] == "verify"
    assert report["failure"]["result"]["findings"]


@pytest.mark.parametrize(
    ("option", "cause"), [("--max-perplexity", "perplexity"), ("--max-repetition", "repetition")]
)
def test_an_answer_out_of_bounds_is_exit_5(
    option: str, cause: str, gguf: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = export(gguf, out, option, "-1", code=5)
    assert report["failure"]["result"]["status"] == "failed"
    assert f"the model's answer is not to be trusted: {cause} " in capsys.readouterr().err
    assert not (out / "SHA256SUMS").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 101.0])
def test_what_is_no_number_is_out_of_bounds(
    value: float, gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity, "perplexity", lambda *_: value)
    report = export(gguf, out, "--max-perplexity", "100", code=5)
    assert report["failure"]["result"]["perplexity"] == (value if math.isfinite(value) else None)


def test_perplexity_and_repetition_are_what_they_say(tiny: tuple[Path, Any], gguf: Path, out: Path) -> None:
    found = export(gguf, out, "--scales", "exact")["steps"]["answer"]
    ids = [1, *sentencepiece_ids(KEYS, PROMPT)]
    with torch.no_grad():
        probabilities = tiny[1](torch.tensor([ids])).logits[0].double().softmax(dim=-1)
    logs = [math.log(float(probabilities[at, token])) for at, token in enumerate(ids[1:])]
    assert found["prompt_tokens"] == len(ids)
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=0.02)
    assert sanity.repetition([1, 2, 3, 4]) == 0
    assert sanity.repetition([5] * 48) == pytest.approx(47 / 48)
    assert sanity.repetition([1, 2, 3, 4] * 12) == pytest.approx(44 / 48)
    assert sanity.repetition([]) == 0


def test_a_model_of_the_hub_is_named_with_its_commit(hub: FakeHub, gguf: Path, out: Path) -> None:
    repository = hub.add("org/tiny", {gguf.name: gguf.read_bytes()})
    assert "is not in the cache" in export("org/tiny:Q6_K", out, "--skip", "download", code=2)["failure"]["error"]
    report = export("org/tiny:Q6_K", out, "--skip", "answer")
    commit = repository.commits["main"]
    assert report["steps"]["download"] == {
        "hub": hub.endpoint, "repository": "org/tiny", "revision": "main", "commit": commit
    }  # fmt: skip
    packages = json.loads((out / "provenance.spdx.json").read_text())["packages"]
    source = next(package for package in packages if package["SPDXID"] == "SPDXRef-Source")
    assert source["downloadLocation"] == f"git+{hub.endpoint}/org/tiny@{commit}"
    assert source["externalRefs"][0]["referenceLocator"] == f"pkg:huggingface/org/tiny@{commit}"
    before = times(out)
    export("org/tiny:Q6_K", out, "--skip", "answer", "--skip", "download")
    assert times(out) == before


def test_what_cannot_be_converted_fails_as_the_command_does(out: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no GGUF at all, but long enough for a header")
    assert "expected 'GGUF'" in export(tmp_path / "text.gguf", out, code=3)["failure"]["error"]
    assert "No such file" in export(tmp_path / "absent.gguf", out, code=4)["failure"]["error"]


@pytest.mark.parametrize(
    "options",
    [
        ("--skip", "nothing"), ("--max-new-tokens", "0"), ("--capacity", "7"), ("--scales", "fp8"),
        ("--export", "never"), ("--device", "tpu"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_exit_2(options: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.app(["ci", str(tmp_path / "model.gguf"), str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_json_prints_the_report_alone(gguf: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # all of it, and nothing
        report = export(gguf, out, "--json")
        assert json.loads(capsys.readouterr().out) == report
    damaged(gguf, out)
    report = export(gguf, out, "--json", "--skip", "convert", code=5)
    assert report["status"] == "failed"
    assert json.loads(capsys.readouterr().out) == report


def test_the_workflow_runs_outside_a_clone(
    hub: FakeHub, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It installs the package with extras that exist, and what it runs is a command of the package."""
    monkeypatch.chdir(tmp_path)
    hub.add("org/tiny", {gguf.name: gguf.read_bytes()})
    text = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    [workflow] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    environment = dict(re.findall(r"^      ([A-Z_]+): (.*)", workflow, re.MULTILINE))
    install, command = (shlex.split(line) for line in re.findall(r"run: (.*)", workflow))
    assert install[:2] == ["pip", "install"]
    requirement = re.fullmatch(r"(\S+)\[(\S+)\] @ \$SOURCE", install[2])
    assert requirement is not None
    assert environment["SOURCE"].startswith("git+https://")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert requirement[1] == project["name"]
    assert set(requirement[2].split(",")) == {"inference", "hub"} <= set(project["optional-dependencies"])
    assert command[0] in project["scripts"]
    assert "MODEL" in environment
    args = ["org/tiny:Q6_K" if word == "$MODEL" else word for word in command[1:]]
    result = invoke(*args, *LOOSE)
    assert result.exit_code == 0, result.stderr
    uploaded = re.findall(r"path: (out\S*)", workflow)
    assert uploaded == [args[2]]
    assert {path.name for path in Path(uploaded[0]).iterdir()} == MADE
