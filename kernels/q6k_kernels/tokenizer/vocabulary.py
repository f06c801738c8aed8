"""The vocabulary in a GGUF file: from text to token ids, and from an id to bytes.

`tokenizer.ggml.model` names one of three kinds:

    llama   SentencePiece's BPE: scores instead of merges, spaces as "▁", bytes without a token as <0xNN>
    gpt2    byte-level BPE: merges; `tokenizer.ggml.pre` names the rule that splits text before merging
    gemma4  merges, too, of text with spaces as "▁" and bytes as <0xNN>, along whole lines

Where a file is silent, llama.cpp's defaults apply, as llama.cpp defines the format (see `kinds`, `special`). The
encoder does not know control tokens, so no text becomes one; callers insert those by id. User-defined tokens (runs
of spaces or newlines in Gemma) are always matched whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.tokenizer.encoders import MAX_MERGES, encoder_of_merges, encoder_of_scores
from q6k_kernels.tokenizer.kinds import KINDS, UNSUPPORTED, Kind
from q6k_kernels.tokenizer.pieces import byte_level_piece, piece, sentencepiece_piece
from q6k_kernels.tokenizer.special import (
    CONTROL,
    NEVER_TEXT,
    NORMAL,
    USER_DEFINED,
    control_texts,
    shown,
    special_ids,
    stop_ids,
    swallowing,
)
from q6k_kernels.tokenizer.splits import SPLITS, UNSUPPORTED_SPLITS, Split
from q6k_kernels.tokenizer.tokenizer_error import GIVE_A_DIRECTORY, TokenizerError, vocabulary_error

MAX_TEXT = 1 << 22
"""Characters of the longest text that is encoded."""
MAX_TOKENS = 1 << 19
MAX_WHOLE_CHARACTERS = 1 << 20
"""Characters of all control and user-defined tokens together; finding them in a text takes memory for each."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, and the encoder that produces them.

    Attributes:
        backend: encodes text to ids; never produces a control token, adds no BOS.
        pieces: the bytes of each token, by id; none of control tokens, but for those that part an answer.
        control: text -> id of control tokens.
        names: "bos", "eos", "eot", "eom", "unk", "pad" -> id, for those that the file names.
        add_bos: whether every text begins with BOS.
        stop: ids that end an answer.
        spelled: ids of the backend that are no tokens -> the tokens of their characters.
        swallowing: ids of tokens that swallow the blanks behind them.
        notes: what was amiss and put right.
    """

    backend: Tokenizer
    pieces: Sequence[bytes]
    control: Mapping[str, int]
    names: Mapping[str, int]
    add_bos: bool
    stop: frozenset[int]
    spelled: Mapping[int, Sequence[int]] = field(default_factory=dict)
    swallowing: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of a control token.

        Raises:
            TokenizerError: the text is longer than `MAX_TEXT`, no Unicode, or more than the encoder can do.
        """
        ids: list[int] = encoded(self.backend, text).ids if text else []
        if self.spelled:
            ids = [token for each in ids for token in self.spelled.get(each, (each,))]
        return ids


def encoded(backend: Tokenizer, text: str, *, around: bool = False) -> Any:
    """Encode a text, with special tokens around it if asked; every failure is a TokenizerError."""
    if len(text) > MAX_TEXT:
        raise TokenizerError(f"the text has {len(text)} characters, more than {MAX_TEXT}", "Give a shorter one.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has U+{ord(text[error.start]):04X}, which is no character, at place {error.start}",
            "Leave it out.",
        ) from error
    try:
        return backend.encode(text, add_special_tokens=around)
    except BaseException as error:
        # The package is written in Rust; its panics are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"the tokenizer cannot encode the text: {str(error)[:200]}", "Give another text or tokenizer."
        ) from error


def check_kind(metadata: Metadata) -> str:
    """Return the kind of a vocabulary, `tokenizer.ggml.model`, after checking that a tokenizer can be made of it.

    Raises:
        TokenizerError: the kind is missing, unknown or not supported, or its rule that splits text is unknown.
        BundleError: a key has the wrong type.
    """
    stated = metadata.string("tokenizer.ggml.model")
    if stated is not None and stated in KINDS:
        _split(metadata, KINDS[stated], [])
        return stated
    *most, last = map(repr, KINDS)
    problem = "is missing" if stated is None else f"is {stated[:80]!r}"
    if reason := UNSUPPORTED.get(stated or ""):
        problem += f", which is not supported ({reason})"
    expected = f"expected {', '.join(most)} or {last}"
    raise TokenizerError(f"{metadata.path}: tokenizer.ggml.model {problem}, {expected}", GIVE_A_DIRECTORY)


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read the vocabulary from the keys `tokenizer.ggml.*`.

    Raises:
        TokenizerError: it is of an unknown kind, incomplete, or contradicts itself; the message names the key.
        BundleError: a key has the wrong type.
    """
    kind = KINDS[check_kind(metadata)]
    limits = {"tokens": MAX_TOKENS, "token_type": MAX_TOKENS, "scores": MAX_TOKENS, "merges": MAX_MERGES}
    for key, most in limits.items():
        if (found := metadata.length(f"tokenizer.ggml.{key}") or 0) > most:
            raise vocabulary_error(metadata, key, f"expected up to {most}, found {found}")
    stated = metadata.strings("tokenizer.ggml.tokens")
    if not stated:
        raise vocabulary_error(metadata, "tokens", "expected one token or more, found none")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(stated)]
    notes = list[str]()
    split = _split(metadata, kind, notes)
    names, replaced = special_ids(metadata, kind.defaults, len(tokens), default_bos=split.default_bos)
    notes = replaced + notes
    ids = {token: i for i, token in enumerate(tokens)}
    types = _types(metadata, len(tokens))
    for text in control_texts(names, ids):
        types[ids[text]] = CONTROL
    for name in ("eos", "eot", "eom"):
        # Texts may need a token of one character; longer ones can be spelled.
        if name in names and len(tokens[names[name]]) > 1:
            types[names[name]] = CONTROL
    never = {token: i for token, i in ids.items() if types[i] in NEVER_TEXT}
    whole = [token for token, i in ids.items() if types[i] == USER_DEFINED]
    check_whole(f"{metadata.path}: tokenizer.ggml.tokens", (*never, *whole))
    texts = {token: i for token, i in ids.items() if token not in never}
    spelled: Mapping[int, Sequence[int]] = {}
    if kind.merges:
        backend, spelled = encoder_of_merges(metadata, texts, len(tokens), split)
    else:
        unknown = tokens[names["unk"]] if "unk" in names else None
        backend = encoder_of_scores(metadata, tokens, types, texts, unknown)
    blanks = swallowing(metadata, tokens, types)
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False, rstrip=ids[token] in blanks) for token in whole]
    )
    add_bos = _add_bos(metadata, split)
    if add_bos and "bos" not in names:
        raise vocabulary_error(metadata, "bos_token_id", "missing, but every text is to have BOS")
    piece_of = sentencepiece_piece if split.plain else byte_level_piece
    visible = shown(ids)
    pieces = [
        token.encode() if i in visible else piece(token, types[i], piece_of) for i, token in enumerate(tokens)
    ]
    return Vocabulary(backend, pieces, never, names, add_bos, stop_ids(names, ids), spelled, blanks, tuple(notes))


def check_whole(where: str, tokens: Iterable[str]) -> None:
    """Raise TokenizerError if tokens that are matched whole have too many characters."""
    if (found := sum(map(len, tokens))) > MAX_WHOLE_CHARACTERS:
        raise TokenizerError(
            f"{where}: control and user-defined tokens have {found} characters, more than {MAX_WHOLE_CHARACTERS}",
            GIVE_A_DIRECTORY,
        )


def _types(metadata: Metadata, count: int) -> list[int]:
    types = metadata.integers("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if len(types) < count:
        problem = f"expected {count}, one for each token, found {len(types)}"
        raise vocabulary_error(metadata, "token_type", problem)
    return types[:count]


def _split(metadata: Metadata, kind: Kind, notes: list[str]) -> Split:
    if kind.split is not None:
        return kind.split
    name = metadata.string("tokenizer.ggml.pre")
    if not name:
        notes.append("tokenizer.ggml.pre is missing: 'default' is taken, as by llama.cpp; answers may be worse")
        name = "default"
    if name not in SPLITS:
        reason = UNSUPPORTED_SPLITS.get(name)
        why = f"which is not supported ({reason})" if reason else f"none of the {len(SPLITS)} names that are known"
        raise TokenizerError(f"{metadata.path}: tokenizer.ggml.pre is {name[:80]!r}, {why}", GIVE_A_DIRECTORY)
    return SPLITS[name]


def _add_bos(metadata: Metadata, split: Split) -> bool:
    stated = metadata.flag("tokenizer.ggml.add_bos_token")
    return split.always_bos or (split.bos if stated is None else stated)
