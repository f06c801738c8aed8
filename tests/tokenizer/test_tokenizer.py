"""Tokenizers from GGUF metadata: ids against independent ones, text back, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import tokenizer_files as files
from q6k_kernels.tokenizer import encoders, vocabulary
from q6k_kernels.tokenizer.text_tokenizer import Tokenizer
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from tokenizer_files import SAMPLES, byte_level, byte_level_keys, sentencepiece, sentencepiece_ids, write

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def loaded(directory: Path, keys: dict[str, Any], **more: Any) -> Tokenizer:
    return load_tokenizer(write(directory / "m", keys | {key.replace("__", "."): v for key, v in more.items()}))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_its_rule(tmp_path: Path, prefix: bool) -> None:
    keys = sentencepiece() | {"ggml.add_space_prefix": prefix}
    tokenizer = loaded(tmp_path, keys)
    seen = set[int]()
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert ids[1:] == sentencepiece_ids(keys, text), text
        seen |= {keys["ggml.token_type"][i] for i in ids[1:]}
        if not prefix:
            assert tokenizer.decode(ids) == text
        elif text and "  " not in text:  # behind a user-defined token there is another prefix
            assert tokenizer.decode(ids) == " " + text
    assert seen == {files.NORMAL, files.BYTE, files.USER_DEFINED}
    assert tokenizer.stop_ids == {2, 259}
    assert len(tokenizer) == len(keys["ggml.tokens"])


@pytest.mark.parametrize(
    ("pre", "splits", "more"),
    [
        ("gpt-2", [], {}),
        ("smollm", [], {"digits": True}),
        ("qwen2", [QWEN2], {}),
        ("llama-bpe", [LLAMA3], {"whole_words": True}),
    ],
)
def test_byte_level_ids_are_those_of_the_tokenizer_it_came_from(
    tmp_path: Path, pre: str, splits: list[str], more: dict[str, bool]
) -> None:
    original = byte_level(splits, **more)
    keys = byte_level_keys(original, pre)
    tokenizer = loaded(tmp_path, keys)
    bos = [keys["ggml.bos_token_id"]] if pre == "llama-bpe" else []
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == bos + original.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    count = keys["ggml.bos_token_id"]
    assert tokenizer.stop_ids == {count, count + 1}  # <|endoftext|> ends too
    # A user-defined token is matched whole, a control token is text.
    assert tokenizer.encode("x<think>y") == [*bos, *original.encode("x").ids, count + 2, *original.encode("y").ids]
    assert tokenizer.encode("<|im_end|>") == bos + original.encode("<|im_end|>").ids


def test_the_default_split_is_llama_cpps(tmp_path: Path) -> None:
    original = byte_level([])
    tokenizer = loaded(tmp_path, byte_level_keys(original, "default"))
    split = tokenizer.vocabulary.backend.pre_tokenizer.pre_tokenize_str
    # Punctuation apart from all else, digits in threes.
    assert [part for part, _ in split("a.b 12345")] == ["a", ".", "b", "Ġ", "123", "45"]


def test_tekken_splits_before_capitals_and_takes_whole_words(tmp_path: Path) -> None:
    """Pieces and BOS as llama.cpp gives them."""
    keys = byte_level_keys(byte_level([]), "tekken")
    keys["ggml.tokens"], keys["ggml.token_type"] = [*keys["ggml.tokens"], "QZ"], [*keys["ggml.token_type"], 1]
    tokenizer = loaded(tmp_path, keys)
    split = tokenizer.vocabulary.backend.pre_tokenizer.pre_tokenize_str
    assert [part for part, _ in split("aHTTPServer's 12 //\n x")] == [
        "a", "HTTPServer", "'s", "Ġ", "1", "2", "Ġ//Ċ", "Ġx",
    ]  # fmt: skip
    assert tokenizer.encode("QZ") == [keys["ggml.bos_token_id"], len(keys["ggml.tokens"]) - 1]


GEMMA4_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GEMMA4 = {
    "ab ab  abc\n\n a b": ["ab", "▁ab", "▁", "▁ab", "c", "\n\n", "▁a", "▁", "b"],
    "é ü\t🦙": ["é", "▁", "<0xC3>", "<0xBC>", "<0x09>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"],
    "\n\n\nx": ["\n\n", "\n", "x"],
    "</s>xy<think>a": ["<", "/", "s", ">", "x", "y", "<think>", "a"],
    "<turn|>": ["<", *(f"<0x{byte:02X}>" for byte in b"turn|"), ">"],
    " ▁": ["▁▁"],
}
"""Texts and their tokens, from llama.cpp."""


def test_gemma_4_merges_plain_text_along_lines(tmp_path: Path) -> None:
    own = [*"▁abc\nés/<>xy", "▁▁", "ab", "▁a", "▁ab", "\n\n", "</s>"]
    tokens = ["<pad>", "<eos>", "<bos>", "<turn|>", "<|tool_response>", "<think>", *GEMMA4_BYTES, *own]
    types = [*[files.CONTROL] * 3, files.NORMAL, *[files.USER_DEFINED] * 2, *[files.BYTE] * 256, *[1] * len(own)]
    keys = {
        "ggml.model": "gemma4",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": ["a b", "▁ ab", "▁ ▁", "\n \n", "▁ a"],
        "ggml.bos_token_id": 2,
        "ggml.add_bos_token": False,  # as files say, wrongly
    }
    tokenizer = loaded(tmp_path, keys)
    for text, expected in GEMMA4.items():
        ids = tokenizer.encode(text)
        assert [tokens[token] for token in ids] == ["<bos>", *expected], text
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    # </s> is an ordinary token here, and no id is taken where the file names none.
    assert tokenizer.stop_ids == {1, 3, 4}
    assert tokenizer.vocabulary.names == {"bos": 2}


def test_bos_is_as_the_file_says_and_eos_is_never_put_behind(tmp_path: Path) -> None:
    keys = sentencepiece()
    body = sentencepiece_ids(keys, "The dog")
    assert loaded(tmp_path, keys, ggml__add_bos_token=False).encode("The dog") == body
    # A text that is to be continued has not ended.
    assert loaded(tmp_path, keys, ggml__add_eos_token=True).encode("The dog") == [1, *body]
    qwen = byte_level_keys(byte_level([QWEN2]), "qwen2")
    tokenizer = loaded(tmp_path, qwen, ggml__add_bos_token=True)
    assert tokenizer.encode("")[0] == tokenizer.bos_id == qwen["ggml.bos_token_id"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_stream_gives_the_same_text_and_no_half_characters(tmp_path: Path, kind: str) -> None:
    keys = sentencepiece() if kind == "llama" else byte_level_keys(byte_level([]), "gpt-2")
    tokenizer = loaded(tmp_path, keys)
    for text in (*SAMPLES, "🦙☃👩‍👧 é"):
        ids, stream = tokenizer.encode(text), tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    ids = tokenizer.encode("🦙")
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids[-4:-1]] == ["", "", ""]
    assert stream.end() == "\ufffd"
    # A broken character does not hold up what follows.
    after = ids[-4:-1] + tokenizer.encode("dog")
    stream = tokenizer.stream()
    assert "dog" in "".join(stream.push(token) for token in after)
    assert tokenizer.decode([10**6, -1]) == ""


def test_what_makes_no_tokenizer_is_named(tmp_path: Path) -> None:
    spm, bpe = sentencepiece(), byte_level_keys(byte_level([]), "gpt-2")
    for keys, words in (
        ({}, "tokenizer.ggml.model is missing"),
        (
            spm | {"ggml.model": "t5"},
            r"is 't5', which is not supported \(.*unigrams.*\), expected 'llama', 'gpt2' or",
        ),
        (spm | {"ggml.model": "x"}, "tokenizer.ggml.model is 'x', expected 'llama', 'gpt2' or 'gemma4'"),
        (bpe | {"ggml.pre": "whitespace"}, r"pre is 'whitespace', which is not supported \(words .*\)"),
        (bpe | {"ggml.pre": "tekkon"}, "tokenizer.ggml.pre is 'tekkon', none of the 90 names that are known"),
        ({key: value for key, value in bpe.items() if key != "ggml.merges"}, "merges: expected .*, found none"),
        (spm | {"ggml.scores": [0.0]}, "scores: expected .*, one for each token, found 1"),
        (spm | {"ggml.token_type": [1]}, "token_type: expected .*, found 1"),
        (
            {"ggml.model": "llama", "ggml.tokens": ["a"], "ggml.scores": [0.0], "ggml.bos_token_id": 9},
            "bos_token_id: missing, but every text is to have BOS",
        ),
    ):
        with pytest.raises(TokenizerError, match=words) as caught:
            load_tokenizer(write(tmp_path / "m", keys))
        assert "--tokenizer DIR" in caught.value.remedy


def test_what_would_cost_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spm, bpe = sentencepiece(), byte_level_keys(byte_level([]), "gpt-2")
    repeated = ["a" * length for length in range(1, 1025)]  # a megabyte, and half a gigabyte of merges
    for keys, words in (
        (
            spm | {"ggml.tokens": repeated, "ggml.scores": [0.0] * 1024, "ggml.token_type": [1] * 1024},
            "characters in",
        ),
        (
            spm
            | {
                "ggml.tokens": [f"{i:04}" + "a" * 1020 for i in range(4200)],
                "ggml.scores": [0.0] * 4200,
                "ggml.token_type": [1] * 4200,
            },
            "more than 4194304 characters in tokens of text",
        ),
        (bpe | {"ggml.merges": ["a b" * (1 << 22)] * 3}, "more than 33554432 characters in merges"),
        (bpe | {"ggml.merges": [f"a{i} b" for i in range(40_000)]}, "more than 65536 of the texts"),
        (
            bpe | {"ggml.merges": ["a b"] * (encoders.MAX_MERGES + 1)},
            "merges: expected up to 786432, found 786433",
        ),
        (bpe | {"ggml.token_type": [1] * (vocabulary.MAX_TOKENS + 1)}, "token_type: expected up to 524288, found"),
        (spm | {"ggml.tokens": []}, "tokens: expected one token or more, found none"),
        (bpe | {"ggml.tokens": ["x" * (1 << 20), "y"], "ggml.token_type": [3, 4]}, "1048577 characters"),
    ):
        with pytest.raises(TokenizerError, match=words):
            loaded(tmp_path, keys)
    monkeypatch.setattr(vocabulary, "MAX_TEXT", 3)
    tokenizer = loaded(tmp_path, bpe)
    for text, words in (
        ("abcd", "has 4 characters, more than 3"),
        ("a\ud800", r"has U\+D800, which is no character"),
    ):
        with pytest.raises(TokenizerError, match=words):
            tokenizer.encode(text)


def test_a_token_too_long_to_be_taken_apart_costs_nothing(tmp_path: Path) -> None:
    keys = sentencepiece()
    keys["ggml.tokens"] += ["a" * (encoders.MAX_TOKEN_CHARACTERS + 1)]
    keys["ggml.scores"] += [1.0]
    keys["ggml.token_type"] += [files.NORMAL]
    tokenizer = loaded(tmp_path, keys)
    assert tokenizer.encode("The dog")[1:] == sentencepiece_ids(keys, "The dog")
