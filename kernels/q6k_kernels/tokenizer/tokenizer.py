"""Text to token ids and back, with the vocabulary in a bundle's `metadata.gguf`.

    tokenizer = load_tokenizer("out/")
    ids = tokenizer.encode("The capital of France is")               BOS as the file says
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])    by the file's chat template
    text = tokenizer.decode(ids)
    stream = tokenizer.stream()                                      text as tokens arrive, whole characters only
    print(stream.push(token), end="") ... print(stream.end())

Text from a user never becomes a control token: "<end_of_turn>" in a prompt or a message is plain text. Only the
chat template itself can insert control tokens.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.tokenizer import chat
from q6k_kernels.tokenizer.vocabulary import (
    TokenizerError,
    Vocabulary,
    byte_level_piece,
    byte_token,
    read_vocabulary,
    sentencepiece_piece,
)

Messages = Sequence[Mapping[str, str]]

# Noncharacters, which Unicode reserves for internal use; one marks text that must not become a control token.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def load_tokenizer(bundle: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Load the tokenizer of a bundle.

    Args:
        bundle: its directory, or its `metadata.gguf`.
        directory: a Hugging Face directory whose tokenizer is used instead; nothing is downloaded, and no code in
            it is run.

    Raises:
        TokenizerError: the vocabulary is of an unknown kind, incomplete or contradictory, or no tokenizer loads
            from the directory.
        BundleError: `metadata.gguf` is broken.
        OSError: `metadata.gguf` cannot be read.
    """
    if directory is not None:
        return _from_directory(Path(directory))
    metadata = read_metadata(bundle)
    return Tokenizer(read_vocabulary(metadata), metadata.string("tokenizer.chat_template"))


class Tokenizer:
    """A vocabulary and a chat template.

    Attributes:
        vocabulary: the tokens and the encoder.
        chat_template: the Jinja text; None if the file has none.
    """

    def __init__(self, vocabulary: Vocabulary, chat_template: str | None) -> None:
        self.vocabulary = vocabulary
        self.chat_template = chat_template

    def __len__(self) -> int:
        return len(self.vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text; None if the file names none."""
        return self.vocabulary.names.get("bos")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self.vocabulary.stop

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS and EOS as the file says; no part becomes a control token."""
        vocabulary = self.vocabulary
        before = [vocabulary.names["bos"]] if vocabulary.add_bos else []
        after = [vocabulary.names["eos"]] if vocabulary.add_eos else []
        return [*before, *self._encode_text(text), *after]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Return the token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: each with `role` ("system", "user", "assistant") and `content`.

        Raises:
            TokenizerError: there is no chat template, or it fails or refuses the messages.
        """
        ids = self._encode_rendered(messages)
        bos = self.vocabulary.names.get("bos")
        # Most templates write BOS themselves.
        return [bos, *ids] if bos is not None and self.vocabulary.add_bos and ids[:1] != [bos] else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens. Control tokens have none; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._piece(token) for token in ids).decode(errors="replace")

    def stream(self) -> TextStream:
        """Return a new decoder for tokens that arrive one at a time."""
        return TextStream(self)

    def _piece(self, token: int) -> bytes:
        # A model can have more rows than the vocabulary has tokens.
        return self.vocabulary.pieces[token] if 0 <= token < len(self.vocabulary.pieces) else b""

    def _encode_text(self, text: str) -> list[int]:
        return self.vocabulary.backend.encode(text, add_special_tokens=False).ids if text else []

    def _encode_rendered(self, messages: Messages) -> list[int]:
        control = self.vocabulary.control
        mark = _unused_mark(messages)
        tokens = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True))
        if tokens:
            # Every place where a control token could begin, overlapping ones too.
            begins = re.compile(f"(?=(?:{tokens}))")
            messages = [
                {key: _marked(value, begins, mark) for key, value in message.items()} for message in messages
            ]
        text = self._render(messages)
        if not tokens:
            return self._encode_text(text)
        ids = list[int]()
        for i, part in enumerate(re.split(f"({tokens})(?!{mark})", text)):
            ids += [control[part]] if i % 2 else self._encode_text(part.replace(mark, ""))
        return ids

    def _render(self, messages: Messages) -> str:
        if self.chat_template is None:
            raise TokenizerError(
                "the model has no chat template",
                "Leave out --chat, or give a tokenizer that has one (--tokenizer DIR).",
            )
        names, control = self.vocabulary.names, {i: token for token, i in self.vocabulary.control.items()}
        variables = {f"{name}_token": control[i] for name, i in names.items() if i in control}
        try:
            return chat.render(self.chat_template, messages, variables)
        except chat.TemplateError as error:
            raise TokenizerError(
                str(error), "Leave out --system if the model knows no such role, or give another template."
            ) from error


class TextStream:
    """Decoder for tokens that arrive one at a time: it returns a character once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this token completes; "" while a character is incomplete."""
        return self._decoder.decode(self._tokenizer._piece(token))

    def end(self) -> str:
        """Return the rest of the text: U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)


def _unused_mark(messages: Messages) -> str:
    text = "".join(value for message in messages for value in message.values())
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise TokenizerError(
            "the messages use all of U+FDD0 to U+FDEF", "Remove one of them: Unicode assigns them to no character."
        )
    return mark


def _marked(text: str, begins: re.Pattern[str], mark: str) -> str:
    """Return the text with a mark after the first character of everything that looks like a control token."""
    at = [match.start() + 1 for match in begins.finditer(text)]
    return mark.join(text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True))


def _from_directory(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise TokenizerError(f"{directory} is not a directory", "Give one with a model's tokenizer.json.")
    try:
        loaded: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # a broken directory can fail in any way
        raise TokenizerError(
            f"{directory}: no tokenizer loads from it: {type(error).__name__}: {error}",
            "Give a directory with a model's tokenizer.json and tokenizer_config.json.",
        ) from error
    return _DirectoryTokenizer(directory, loaded, backend)


class _DirectoryTokenizer(Tokenizer):
    """A tokenizer that transformers loaded; it adds BOS and EOS by its own rules."""

    def __init__(self, directory: Path, loaded: Any, backend: Any) -> None:
        self._loaded = loaded
        # JSON without escapes, so that "▁" can be searched for.
        decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
        byte_level = "ByteLevel" in decoder
        if not byte_level and "▁" not in decoder:
            raise TokenizerError(
                f"{directory}: its decoder is neither byte-level nor SentencePiece's: {decoder[:200]}",
                "Give a tokenizer of one of these two kinds.",
            )
        added = loaded.added_tokens_decoder
        control = {token.content: i for i, token in added.items() if token.special}
        pieces = []
        for i in range(max([len(loaded) - 1, *added]) + 1):
            token = loaded.convert_ids_to_tokens(i) or ""
            pieces.append(b"")
            if i in added:
                pieces[i] = b"" if added[i].special else token.encode()
            elif byte_level:
                pieces[i] = byte_level_piece(token)
            else:
                pieces[i] = byte_token(token) or sentencepiece_piece(token)
        names = {
            name: getattr(loaded, f"{name}_token_id")
            for name in ("bos", "eos", "unk", "pad")
            if getattr(loaded, f"{name}_token_id") is not None
        }
        stop = frozenset({names["eos"]} if "eos" in names else ())
        template = loaded.chat_template if isinstance(loaded.chat_template, str) else None
        super().__init__(Vocabulary(backend, pieces, control, names, False, False, stop), template)

    def encode(self, text: str) -> list[int]:
        return list(self._loaded(text, split_special_tokens=True)["input_ids"])

    def _encode_rendered(self, messages: Messages) -> list[int]:
        for token in self.vocabulary.control:
            if any(token in value for message in messages for value in message.values()):
                raise TokenizerError(
                    f"a message contains {token!r}, which a tokenizer from a directory would read as that token",
                    "Leave it out, or take the tokenizer of the GGUF file, which tells the two apart.",
                )
        return list(self._loaded(self._render(messages), add_special_tokens=False)["input_ids"])
