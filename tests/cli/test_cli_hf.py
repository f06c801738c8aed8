"""`q6k-convert hf`: the files that transformers wants, listed and checked, and nobody else's touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from bundle_helpers import failed, invoke, listing
from q6k_convert.run import publishing, running
from q6k_kernels import load_model
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from tiny_chat import tiny_chat
from tiny_models import Tiny
from tokenizer_files import TEMPLATE

FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny llama with a vocabulary."""
    return tiny_chat(tmp_path_factory.mktemp("hf"))[0]


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_transformers_opens_what_it_writes(bundle: Path) -> None:
    done = invoke("hf", bundle, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["written"]) == set(report["files"]) == FILES
    for name, entry in report["files"].items():
        content = (bundle / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert invoke("verify", bundle, "--device", "cpu").exit_code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    ids = tokenizer("The quick fox", return_tensors="pt").input_ids
    assert ids.tolist() == [load_tokenizer(bundle).encode("The quick fox")]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, load_model(bundle, dtype=torch.bfloat16)(ids).logits)
    assert sorted(model.generation_config.eos_token_id) == sorted(load_tokenizer(bundle).stop_ids)
    assert model.generation_config.suppress_tokens == [5]
    assert model.generation_config.pad_token_id == 0
    assert (bundle / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    answer = pipeline("text-generation", str(bundle))(
        [{"role": "user", "content": "The dog"}], max_new_tokens=3, do_sample=False
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_the_same_bundle_gets_the_same_bytes_and_the_second_run_changes_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(bundle, tmp_path / "again"))
    for directory in (bundle, again):
        assert invoke("hf", directory).exit_code == 0
    assert listing(bundle) == listing(again)
    done = invoke("hf", bundle)
    assert done.exit_code == 0
    assert "all there already" in done.stderr
    assert listing(bundle) == listing(again)
    done = invoke("hf", bundle, "--weights", "auto", "--json")
    assert json.loads(done.stdout)["written"] == ["config.json"]
    assert json.loads((bundle / "config.json").read_text())["quantization_config"]["weights"] == "auto"
    assert invoke("verify", bundle, "--device", "cpu").exit_code == 0


def test_a_run_that_was_killed_is_ended_by_the_next(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = (bundle / "bundle.json").read_bytes()
    write = publishing._write

    def killed(directory: Path, name: str, content: bytes) -> bool:
        if name == "config.json":
            raise KeyboardInterrupt
        return write(directory, name, content)

    monkeypatch.setattr(publishing, "_write", killed)
    assert invoke("hf", bundle).exit_code == 130
    assert not (bundle / "config.json").exists()
    assert (bundle / "bundle.json").read_bytes() == manifest
    assert invoke("verify", bundle, "--fast").exit_code == 0
    monkeypatch.undo()
    assert invoke("hf", bundle).exit_code == 0
    assert invoke("verify", bundle, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json"])
def test_others_files_are_left_alone(bundle: Path, name: str) -> None:
    (bundle / name).write_text("mine", encoding="utf-8")
    before = listing(bundle)
    failed(invoke("hf", bundle), 4, f"{name} is there, and this command did not write it so", "Move it away")
    assert listing(bundle) == before


def test_a_changed_file_is_found_and_never_replaced(bundle: Path, made: Path) -> None:
    assert invoke("hf", bundle).exit_code == 0
    card = bundle / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("llama", "LLAMA"), encoding="utf-8")
    failed(invoke("verify", bundle, "--device", "cpu"), 5, "README.md: SHA-256 is", "Make the bundle again")
    failed(invoke("hf", bundle), 4, "README.md is there, and this command did not write it so", "Move it away")
    source = made.parent / "model.gguf"
    failed(invoke(source, bundle, "--force"), 4, "what is not part of its bundle: README.md", "Move those away")
    card.unlink()
    failed(invoke("verify", bundle, "--device", "cpu"), 5, "README.md: missing", "Make the bundle again")
    assert invoke("hf", bundle).exit_code == 0
    assert invoke(source, bundle, "--force", "--scales", "exact").exit_code == 0
    assert not FILES & {path.name for path in bundle.iterdir()}


def test_links_of_a_cache_are_not_written_to(bundle: Path, tmp_path: Path) -> None:
    (bundle / "bundle.json").rename(bundle / "blob")
    (bundle / "bundle.json").symlink_to("blob")
    failed(invoke("hf", bundle), 4, "the bundle is made of links", "cp -rL")


def test_what_is_missing_is_named(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(invoke("hf", tmp_path), 3, "is not a bundle", "")
    monkeypatch.setattr(running, "find_spec", lambda name: None if name == "transformers" else object())
    failed(invoke("hf", bundle), 6, "writing files for transformers needs transformers", "q6k-convert[inference]")


def test_without_a_tokenizer_the_next_step_is_one_that_works(bundle: Path, tmp_path: Path) -> None:
    assert invoke("hf", bundle).exit_code == 0
    tokenizer = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(bundle).save_pretrained(tokenizer)
    keys = {"tokenizer.ggml.model": "bert"}
    bare = Tiny("llama", "llama", {"vocab_size": len(load_tokenizer(bundle))}, keys).bundle(tmp_path / "bare")[0]
    step = f"q6k-convert generate {bare} --tokenizer DIR"
    failed(invoke("hf", bare), 3, "tokenizer.ggml.model is 'bert'", step)
    given = [tokenizer if word == "DIR" else word for word in step.split()[1:]]
    assert invoke(*given, "-p", "The dog", "--max-new-tokens", "2", "--device", "cpu").exit_code == 0


def test_a_hostile_entry_is_refused(bundle: Path) -> None:
    from q6k_kernels.bundle import manifest as manifests
    from q6k_kernels.bundle.manifest import Companion

    manifest: Any = manifests.read(bundle)
    manifest.companions["../x"] = Companion(1, "0" * 64)
    (bundle / "bundle.json").write_bytes(manifests.serialize(manifest))
    with pytest.raises(manifests.BundleError, match=r"companions: expected names of .*, found '../x'"):
        manifests.read(bundle)
