"""Tokenizers in a Hugging Face directory. transformers loads them, downloads nothing and runs no code in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from q6k_kernels.tokenizer.pieces import byte_level_piece, byte_token, sentencepiece_piece
from q6k_kernels.tokenizer.special import end_texts
from q6k_kernels.tokenizer.text_tokenizer import Messages, Tokenizer
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from q6k_kernels.tokenizer.vocabulary import (
    MAX_TOKENS,
    Vocabulary,
    check_whole,
    encoded,
)

MAX_FILE = 1 << 26
"""Bytes of the largest JSON file that is read; that of 262,144 tokens has 33 MB."""
GIVE_ANOTHER = "Give a directory with a model's tokenizer.json and tokenizer_config.json."


def from_directory(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a directory.

    Raises:
        TokenizerError: it is not a directory, or no tokenizer loads from it.
        OSError: a file cannot be read.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    if not directory.is_dir():
        raise TokenizerError(f"{directory} is not a directory", "Give one with a model's tokenizer.json.")
    _check_ids(directory)
    try:
        loaded: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except BaseException as error:  # a broken directory can fail in any way, a panic of Rust code among them
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{directory}: no tokenizer loads from it: {type(error).__name__}: {str(error)[:1000]}",
            GIVE_ANOTHER,
        ) from error
    return _DirectoryTokenizer(directory, loaded, backend)


class _DirectoryTokenizer(Tokenizer):
    """A tokenizer that transformers loaded; it adds BOS by its own rules."""

    def __init__(self, directory: Path, loaded: Any, backend: Any) -> None:
        # JSON without escapes, so that "▁" can be searched for.
        decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
        byte_level = "ByteLevel" in decoder
        if not byte_level and "▁" not in decoder:
            raise TokenizerError(
                f"{directory}: its decoder is neither byte-level nor SentencePiece's: {decoder[:200]}",
                "Give a tokenizer of one of these two kinds.",
            )
        backend.no_truncation()
        backend.no_padding()
        ids, added = loaded.get_vocab(), loaded.added_tokens_decoder
        largest = max([*ids.values(), *added], default=-1)
        control = {token.content: i for i, token in added.items() if token.special}
        control |= {text: ids[text] for text in end_texts(ids.keys())}
        check_whole(str(directory), [*control, *(token.content for token in added.values())])
        never, pieces = set(control.values()), [b""] * (largest + 1)
        for token, i in ids.items():
            if i in never:
                continue
            if i in added:
                pieces[i] = token.encode()
            elif byte_level:
                pieces[i] = byte_level_piece(token)
            else:
                pieces[i] = byte_token(token) or sentencepiece_piece(token)
        names = {
            name: getattr(loaded, f"{name}_token_id")
            for name in ("bos", "eos", "unk", "pad")
            if getattr(loaded, f"{name}_token_id") is not None
        }
        stop = {ids[text] for text in end_texts(ids.keys())} | _ends(directory)
        stop |= {names["eos"]} if "eos" in names else set()
        template = loaded.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        vocabulary = Vocabulary(backend, pieces, control, names, add_bos=False, stop=frozenset(stop))
        super().__init__(vocabulary, template if isinstance(template, str) else None)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that is to be continued, as the directory's rules begin one."""
        backend = self.vocabulary.backend
        backend.encode_special_tokens = True
        found = encoded(backend, text, around=True)
        ids, around = list(found.ids), list(found.special_tokens_mask)
        # Texts without a token become the unknown one.
        never = set(self.vocabulary.control.values()) - {self.vocabulary.names.get("unk")}
        for token, special in zip(ids, around, strict=True):
            if token in never and not special:
                raise self._ambiguous("the text", token)
        while ids and around.pop() and ids[-1] in self.stop_ids:
            ids.pop()
        return ids

    def _encode_rendered(self, messages: Messages) -> list[int]:
        for message in messages:
            for value in message.values():
                if found := self._finder.find(value):
                    raise self._ambiguous("a message", found[0][2])
        backend = self.vocabulary.backend
        backend.encode_special_tokens = False
        ids: list[int] = encoded(backend, self._render(messages)).ids
        return ids

    def _ambiguous(self, where: str, token: int) -> TokenizerError:
        text = next(text for text, i in self.vocabulary.control.items() if i == token)
        return TokenizerError(
            f"{where} contains {text!r}, which a tokenizer from a directory would read as that token",
            "Leave it out, or take the tokenizer of the GGUF file, which tells the two apart.",
        )


def _check_ids(directory: Path) -> None:
    """Check ids before transformers loads them: it makes tables up to the largest."""
    read = {name: _read(path) for name in {row[0] for row in _IDS} if (path := directory / name).is_file()}
    for name, keys, ids_of in _IDS:
        content = read.get(name)
        for key in keys:
            content = content.get(key) if isinstance(content, dict) else None
        found = ids_of(content) if isinstance(content, dict | list) else []
        largest = max((token for token in found if isinstance(token, int)), default=0)
        if largest >= MAX_TOKENS:
            raise TokenizerError(
                f"{directory / name}: a token has the id {largest}, and {MAX_TOKENS - 1} is the largest allowed",
                "Give the tokenizer that belongs to the model.",
            )


def _stated(content: Any) -> Iterable[Any]:
    return [each.get("id") for each in content if isinstance(each, dict)]


def _values(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else range(len(content))


def _decoded(content: Any) -> Iterable[Any]:
    return [int(key) for key in content if str(key).isdecimal() and len(key) < _LONGEST_ID]


_LONGEST_ID = 1000  # Python refuses to read longer numbers
_IDS: tuple[tuple[str, tuple[str, ...], Callable[[Any], Iterable[Any]]], ...] = (
    ("tokenizer.json", ("added_tokens",), _stated),
    ("tokenizer.json", ("model", "vocab"), _values),
    ("tokenizer_config.json", ("added_tokens_decoder",), _decoded),
    ("added_tokens.json", (), _values),
    ("vocab.json", (), _values),
)
"""Where files have ids of tokens: file, keys that lead there, and what gives the ids."""


def _ends(directory: Path) -> set[int]:
    """Return the ends of answers that `generation_config.json` names, if there is one."""
    path = directory / "generation_config.json"
    content = _read(path) if path.is_file() else None
    stated = content.get("eos_token_id") if isinstance(content, dict) else None
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(end) is int for end in ends):
        raise TokenizerError(
            f"{path}: eos_token_id: expected one id or several, found {str(stated)[:200]}", "Remove the file."
        )
    return set(ends)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        raw = file.read(MAX_FILE + 1)
    if len(raw) > MAX_FILE:
        raise TokenizerError(f"{path}: more than {MAX_FILE} bytes", GIVE_ANOTHER)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: no JSON: {str(error)[:200]}", GIVE_ANOTHER) from error
