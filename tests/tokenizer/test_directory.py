"""Tokenizers from a Hugging Face directory in the place of the file's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tokenizers import AddedToken, processors

from q6k_kernels.tokenizer import directory
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from q6k_kernels.tokenizer.vocabulary import MAX_TOKENS
from tokenizer_files import SAMPLES, byte_level


def saved(to: Path, backend: Any, **more: Any) -> Any:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **more)
    fast.save_pretrained(to)
    return fast


def test_it_takes_the_files_place(tmp_path: Path) -> None:
    original = byte_level([])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=original, eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    fast.save_pretrained(tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "nowhere", tmp_path / "hf")
    end = fast.eos_token_id
    assert tokenizer.stop_ids == {end}
    for text in (*SAMPLES, "<|end|>"):
        assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.decode([*tokenizer.encode(text), end]) == text
    assert tokenizer.encode_chat([{"role": "user", "content": "dog"}]) == [*original.encode("dog").ids, end]
    with pytest.raises(TokenizerError, match=r"a message contains '<\|end\|>'"):
        tokenizer.encode_chat([{"role": "user", "content": "dog<|end|>"}])
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "no tokenizer loads from it"), ("absent", "is not a directory")):
        with pytest.raises(TokenizerError, match=words):
            load_tokenizer(tmp_path / "nowhere", tmp_path / name)


def test_ends_are_those_of_its_texts_and_of_its_generation_config(tmp_path: Path) -> None:
    original = byte_level([])
    original.add_tokens([AddedToken("<end_of_turn>", special=False, normalized=False)])
    end = original.token_to_id("<end_of_turn>")
    saved(tmp_path, original, eos_token="<over>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = load_tokenizer(tmp_path, tmp_path)
    assert tokenizer.stop_ids == {end, end + 1, 7, 9}
    assert tokenizer.decode([end]) == ""
    with pytest.raises(TokenizerError, match="the text contains '<end_of_turn>'"):
        tokenizer.encode("dog<end_of_turn>")
    for stated, words in (({"eos_token_id": 5}, None), ({}, None), ([], None), ({"eos_token_id": "x"}, "found x")):
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
        if words is None:
            assert load_tokenizer(tmp_path, tmp_path).stop_ids >= {end, end + 1}
        else:
            with pytest.raises(TokenizerError, match=words):
                load_tokenizer(tmp_path, tmp_path)


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level([]))
    fast.chat_template = {"default": "{{ messages[0].content }}", "rag": "x"}
    fast.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, tmp_path).chat_template == "{{ messages[0].content }}"


def test_its_eos_is_not_put_behind_a_prompt(tmp_path: Path) -> None:
    original = byte_level([])
    original.add_special_tokens(["<s>", "</s>"])
    ids = [(token, original.token_to_id(token)) for token in ("<s>", "</s>")]
    original.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    saved(tmp_path, original, bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(tmp_path, tmp_path)
    assert tokenizer.encode("dog") == [ids[0][1], *original.encode("dog", add_special_tokens=False).ids]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"zz": 4_000_000_000}}}),
        ("tokenizer.json", {"added_tokens": [{"id": MAX_TOKENS}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4000000000": {}}}),
        ("added_tokens.json", {"zz": 4_000_000_000}),
    ],
)
def test_an_id_that_no_model_has_is_refused(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(
        TokenizerError, match=rf"{name}: a token has the id \d+, and {MAX_TOKENS - 1} is the largest"
    ):
        load_tokenizer(tmp_path, tmp_path)


def test_files_that_are_no_json_or_too_large_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer.json: no JSON"):
        load_tokenizer(tmp_path, tmp_path)
    monkeypatch.setattr(directory, "MAX_FILE", 0)
    with pytest.raises(TokenizerError, match="tokenizer.json: more than 0 bytes"):
        load_tokenizer(tmp_path, tmp_path)


def test_a_panic_of_the_encoder_is_an_error(tmp_path: Path) -> None:
    """A regular expression that gives up, in the package's Rust code."""
    saved(tmp_path, byte_level(["(a*)*b|."]))
    tokenizer = load_tokenizer(tmp_path, tmp_path)
    assert tokenizer.encode("dog")
    with pytest.raises(TokenizerError, match="cannot encode the text"):
        tokenizer.encode("a" * 5000)
