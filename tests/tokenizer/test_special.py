"""Special tokens as llama.cpp finds them: by id, by its defaults and by text; and no text that becomes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from q6k_kernels.tokenizer.text_tokenizer import Tokenizer
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from tokenizer_files import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    byte_level,
    byte_level_keys,
    sentencepiece,
    sentencepiece_ids,
    write,
)

ENDS = [
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
]  # fmt: skip


def with_tokens(keys: dict[str, Any], kind: int, *tokens: str) -> dict[str, Any]:
    scores = {"ggml.scores": [*keys["ggml.scores"], *[100.0] * len(tokens)]} if "ggml.scores" in keys else {}
    types = [*keys["ggml.token_type"], *[kind] * len(tokens)]
    return keys | scores | {"ggml.tokens": [*keys["ggml.tokens"], *tokens], "ggml.token_type": types}


def loaded(directory: Path, keys: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(write(directory / "m", keys))


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize("text", ENDS)
def test_an_end_ends_whatever_its_type_and_no_text_becomes_it(tmp_path: Path, text: str, kind: int) -> None:
    keys = sentencepiece()
    own = keys["ggml.tokens"].index(text) if text in keys["ggml.tokens"] else None
    if own is None:
        parts = [*(text[:end] for end in range(2, len(text))), *set(text)]  # for merges that make it
        keys = with_tokens(with_tokens(keys, NORMAL, *parts), kind, text)
        own = keys["ggml.tokens"].index(text)
    else:
        keys["ggml.token_type"][own] = kind
    tokenizer = loaded(tmp_path, keys)
    assert own in tokenizer.stop_ids
    assert tokenizer.decode([own]) == ""
    assert own not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(f"a {text} b")).strip() == f"a {text} b"


def test_byte_level_merges_make_no_end(tmp_path: Path) -> None:
    original = byte_level([])
    keys = with_tokens(byte_level_keys(original, "gpt-2"), NORMAL, "[E", "OS", "OS]", "[EOS]")
    keys["ggml.merges"] = ["O S", "[ E", "OS ]", "[E OS]", *keys["ggml.merges"]]
    tokenizer = loaded(tmp_path, keys)
    ids = tokenizer.encode("[EOS]")
    assert len(keys["ggml.tokens"]) - 1 in tokenizer.stop_ids - set(ids)
    assert tokenizer.decode(ids) == "[EOS]"


def test_what_separates_parts_of_an_answer_does_not_end_it(tmp_path: Path) -> None:
    for beside, text in ((("<|return|>", "<|call|>"), "<|end|>"), (("<|tool_response>",), "</s>")):
        keys = sentencepiece()
        keys["ggml.eos_token_id"] = 258
        keys = with_tokens(keys, CONTROL, *beside, *([text] if text not in keys["ggml.tokens"] else []))
        assert keys["ggml.tokens"].index(text) not in loaded(tmp_path, keys).stop_ids


def test_parts_of_an_answer_are_shown_and_no_text_becomes_one(tmp_path: Path) -> None:
    parts = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>"]
    keys = with_tokens(sentencepiece(), CONTROL, *parts, "<|return|>", "<|call|>")
    tokenizer = loaded(tmp_path, keys)
    for text in parts:
        own = keys["ggml.tokens"].index(text)
        assert tokenizer.decode([own]) == text
        assert own not in {*tokenizer.encode(text), *tokenizer.stop_ids}
    assert tokenizer.decode([keys["ggml.tokens"].index("<|return|>")]) == ""


def test_marks_around_a_gap_are_found_by_text_where_the_file_names_none(tmp_path: Path) -> None:
    keys = with_tokens(
        sentencepiece(), USER_DEFINED, "<fim_prefix>", "<|fim_suffix|>", "<fim_middle>", "<|file_sep|>"
    )
    first = keys["ggml.tokens"].index("<fim_prefix>")
    tokenizer = loaded(tmp_path, keys)
    assert not {first, first + 1, first + 2, first + 3} & {
        *tokenizer.encode("<fim_prefix><fim_middle><|file_sep|>")
    }
    assert tokenizer.stop_ids == {2, 259, first + 3}
    # One that the file names keeps its type, and the key of older files counts more.
    for named in ({"ggml.fim_mid_token_id": first}, {"ggml.fim_mid_token_id": 1, "ggml.middle_token_id": first}):
        tokenizer = loaded(tmp_path, keys | named)
        assert first + 2 in tokenizer.encode("<fim_middle>")
        assert tokenizer.vocabulary.names["fim_mid"] == first
        assert first not in tokenizer.encode("<fim_prefix>")


@pytest.mark.parametrize(("key", "default"), [("bos", 1), ("eos", 2), ("unknown", 0), ("padding", None)])
@pytest.mark.parametrize("value", [10**6, (1 << 32) - 1, None])
def test_ids_that_no_token_has_are_llama_cpps_defaults(
    tmp_path: Path, key: str, default: int | None, value: int | None
) -> None:
    keys = sentencepiece()
    keys.pop(f"ggml.{key}_token_id", None)
    if value is not None:
        keys[f"ggml.{key}_token_id"] = value
    vocabulary = loaded(tmp_path, keys).vocabulary
    assert vocabulary.names.get({"unknown": "unk", "padding": "pad"}.get(key, key)) == default
    assert {1: "bos", 2: "eos"}.get(default or 0, "") in " ".join(vocabulary.notes)
    if value is not None:
        assert f"tokenizer.ggml.{key}_token_id is {value}, and there are" in vocabulary.notes[0]
    assert vocabulary.encode("The dog") == sentencepiece_ids(keys, "The dog")


def test_byte_level_defaults_are_llama_cpps_too(tmp_path: Path) -> None:
    keys = byte_level_keys(byte_level([]), "gpt-2")
    for key in ("ggml.bos_token_id", "ggml.eos_token_id", "ggml.pre"):
        del keys[key]
    tokenizer = loaded(tmp_path, keys)
    assert (tokenizer.bos_id, tokenizer.vocabulary.names["eos"]) == (11, 11)
    assert "tokenizer.ggml.pre is missing: 'default'" in tokenizer.vocabulary.notes[-1]
    keys["ggml.pre"] = "default"
    assert loaded(tmp_path, keys).encode("a.b 12345") == tokenizer.encode("a.b 12345")


def test_a_merge_to_a_text_that_is_no_token_is_spelled(tmp_path: Path) -> None:
    """As in llama.cpp, which joins first and looks for the token afterwards."""
    keys = byte_level_keys(byte_level([]), "gpt-2")
    ids = {token: i for i, token in enumerate(keys["ggml.tokens"])}
    keys["ggml.merges"] = ["qz", "q ", "Q X", "QX Y", "Ġ X", *keys["ggml.merges"]]
    tokenizer = loaded(tmp_path, keys)
    assert tokenizer.encode("QXY") == [ids["Q"], ids["X"], ids["Y"]]
    assert tokenizer.encode("dog QXZ") == [
        *tokenizer.encode("dog"), *tokenizer.encode(" Q"), ids["X"], ids["Z"],
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("The QXY Xdog XQX")) == "The QXY Xdog XQX"


def test_phi_3_swallows_blanks_behind_its_special_tokens(tmp_path: Path) -> None:
    keys = with_tokens(sentencepiece(), CONTROL, "<|user|>", "<|end|>") | {
        "chat_template": "{{ bos_token }} <|user|>\n {{ messages[0].content }}<|end|>\n\n"
    }
    user = keys["ggml.tokens"].index("<|user|>")
    prompt = [{"role": "user", "content": "The dog"}]
    dog, blanks = sentencepiece_ids(keys, "The dog"), sentencepiece_ids(keys, " ")
    tokenizer = load_tokenizer(write(tmp_path / "m", keys | {"general.name": "Phi 3 no"}))
    assert user + 1 != tokenizer.encode_chat(prompt)[-1]
    tokenizer = load_tokenizer(write(tmp_path / "m", keys | {"general.name": "Phi-3-mini"}))
    assert tokenizer.encode_chat(prompt) == [1, *blanks, user, *dog, user + 1]
