"""`tokenizer.json` and its neighbours: transformers' tokenizer gives the ids of ours, and the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.tokenizer.hugging_face import tokenizer_files
from q6k_kernels.tokenizer.text_tokenizer import Tokenizer
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from tokenizer_files import SAMPLES, byte_level, byte_level_keys, sentencepiece, write

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "The quick fox"}, {"role": "assistant", "content": "jumps"}]


def gemma4() -> dict[str, Any]:
    single = [*dict.fromkeys("".join(SAMPLES).replace(" ", "▁")), "▁"]
    own = [*dict.fromkeys(single), "▁▁", "qu", "▁qu"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "ggml.model": "gemma4",
        "ggml.tokens": ["<pad>", "<eos>", "<bos>", "<turn|>", *bytes_, *own],
        "ggml.token_type": [3, 3, 3, 3, *[6] * 256, *[1] * len(own)],
        "ggml.merges": ["▁ ▁", "q u", "▁ qu"],
        "ggml.bos_token_id": 2,
        "ggml.eos_token_id": 1,
    }


KINDS = {
    "sentencepiece": sentencepiece(),
    "sentencepiece, no space before": sentencepiece() | {"ggml.add_space_prefix": False},
    "sentencepiece, no BOS": sentencepiece() | {"ggml.add_bos_token": False},
    "byte-level": byte_level_keys(byte_level([]), "gpt-2"),
    "byte-level, BOS": byte_level_keys(byte_level([], whole_words=True), "llama-bpe"),
    "gemma 4": gemma4(),
}


def both(directory: Path, keys: dict[str, Any]) -> tuple[Tokenizer, Any]:
    write(directory, keys)
    _, contents = tokenizer_files(read_metadata(directory))
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_our_tokenizer(kind: str, tmp_path: Path) -> None:
    keys = KINDS[kind] | {"chat_template": PLAIN, "llama.context_length": 300}
    ours, theirs = both(tmp_path, keys)
    for text in SAMPLES:
        if "<s>" in text:
            continue  # there it is the token
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids).removeprefix(
            " " if kind in ("sentencepiece", "sentencepiece, no BOS") else ""
        )
    assert theirs.apply_chat_template(MESSAGES, return_dict=False) == ours.encode_chat(MESSAGES)
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.vocabulary.names["eos"]
    assert theirs.model_max_length == 300
    assert theirs.padding_side == "left"
    assert set(ours.vocabulary.control.values()) <= set(theirs.added_tokens_decoder)
    for text, token in ours.vocabulary.control.items():
        assert theirs.convert_tokens_to_ids(text) == token


def test_merges_of_what_are_no_tokens_cannot_be_said(tmp_path: Path) -> None:
    keys = byte_level_keys(byte_level([]), "gpt-2")
    write(tmp_path, keys | {"ggml.merges": [*keys["ggml.merges"], "qqq zzz"]})
    with pytest.raises(TokenizerError, match=r"3 of the texts that they join are no tokens"):
        tokenizer_files(read_metadata(tmp_path))


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages | dance }}"])
def test_a_chat_template_that_is_none_of_jinja_is_named(template: str, tmp_path: Path) -> None:
    write(tmp_path, KINDS["byte-level"] | {"chat_template": template})
    with pytest.raises(TokenizerError, match=r"metadata.gguf: tokenizer.chat_template: .* line 1: ") as caught:
        tokenizer_files(read_metadata(tmp_path))
    assert "gguf-new-metadata --chat-template-file" in caught.value.remedy
