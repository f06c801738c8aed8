"""A vocabulary as llama.cpp reads it: its ids of a text, and what it says of tokens."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, Union, c_bool, c_char, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from golden_logits import Llama

_NAME_BYTES = 128
_STRING = 3
_LONGEST_PIECE = 1 << 16


class _Value(Union):
    _fields_ = [
        ("whole", c_int64),
        ("real", c_double),
        ("flag", c_bool),
        ("text", c_char * _NAME_BYTES),
    ]


class Override(Structure):
    """`llama_model_kv_override`: a key that counts in place of the file's."""

    _fields_ = [
        ("tag", c_int32),
        ("key", c_char * _NAME_BYTES),
        ("value", _Value),
    ]


class LlamaVocabulary:
    """A vocabulary, loaded by llama.cpp from a GGUF file.

    Args:
        llama: the library.
        path: the file; nothing but the vocabulary is loaded.
        pre: a rule that splits texts, in place of the one that the file names.

    Attributes:
        bos: id of BOS; -1 if there is none.
        eos: id of EOS; -1 if there is none.
        add_bos: whether a text begins with BOS.
    """

    def __init__(self, llama: Llama, path: Path, pre: str | None = None) -> None:
        self._library: Any = llama.library
        params = self._library.llama_model_default_params()
        params.vocab_only = True
        overrides = (Override * 2)()
        if pre is not None:
            overrides[0].tag, overrides[0].key = _STRING, b"tokenizer.ggml.pre"
            overrides[0].value.text = pre.encode()
            params.kv_overrides = ctypes.cast(overrides, c_void_p)
        self._model = c_void_p(self._library.llama_model_load_from_file(str(path).encode(), params))
        if not self._model:
            raise ValueError(f"llama.cpp cannot load the vocabulary of {path}")
        self._library.llama_model_get_vocab.restype = c_void_p
        self._vocabulary = c_void_p(self._library.llama_model_get_vocab(self._model))
        for name in ("is_eog", "is_control", "get_add_bos"):
            getattr(self._library, f"llama_vocab_{name}").restype = c_bool
        self._library.llama_tokenize.argtypes = [
            c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool,
        ]  # fmt: skip
        self.bos = int(self._library.llama_vocab_bos(self._vocabulary))
        self.eos = int(self._library.llama_vocab_eos(self._vocabulary))
        self.add_bos = bool(self._library.llama_vocab_get_add_bos(self._vocabulary))

    def __len__(self) -> int:
        return int(self._library.llama_vocab_n_tokens(self._vocabulary))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; no part becomes a control token."""
        raw = text.encode()
        room = len(raw) + 16
        ids = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, False, False)
        if count < 0:
            raise ValueError(f"a text of {len(raw)} bytes has {-count} tokens")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; none of a control token."""
        buffer = ctypes.create_string_buffer(_LONGEST_PIECE)
        count = self._library.llama_token_to_piece(self._vocabulary, token, buffer, _LONGEST_PIECE, 0, False)
        return buffer.raw[:count]

    @property
    def stop(self) -> frozenset[int]:
        """Ids that end an answer."""
        is_end = self._library.llama_vocab_is_eog
        return frozenset(token for token in range(len(self)) if is_end(self._vocabulary, token))

    @property
    def control(self) -> frozenset[int]:
        """Ids of control tokens."""
        is_control = self._library.llama_vocab_is_control
        return frozenset(token for token in range(len(self)) if is_control(self._vocabulary, token))

    def close(self) -> None:
        """Free the vocabulary."""
        self._library.llama_model_free(self._model)
