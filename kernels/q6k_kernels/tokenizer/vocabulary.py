"""The vocabulary in a GGUF file: from text to token ids, and from an id to bytes.

`tokenizer.ggml.model` names one of two kinds:

    llama   SentencePiece's BPE: scores instead of merges, spaces as "▁", bytes without a token as <0xNN>
    gpt2    byte-level BPE: merges; `tokenizer.ggml.pre` names the rule that splits text before merging

Where a file is silent, llama.cpp's defaults apply, as llama.cpp defines the format (see `special`). The encoder,
from the package `tokenizers`, does not know control tokens, so no text becomes one; callers insert those by id.
User-defined tokens (runs of spaces or newlines in Gemma) are always matched whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import ModelError
from q6k_kernels.tokenizer.pieces import SPACE, piece
from q6k_kernels.tokenizer.special import (
    CONTROL,
    NEVER_TEXT,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    end_texts,
    special_ids,
    stop_ids,
    swallowing,
)
from q6k_kernels.tokenizer.splits import SPLITS, WHOLE_WORDS_AND_BOS

MAX_TEXT = 1 << 22
"""Characters of the longest text that is encoded."""
MAX_TOKENS = 1 << 19
MAX_MERGES = 3 << 18
MAX_MERGE_CHARACTERS = 1 << 25
"""Characters of all merges together."""
MAX_UNNAMED = 1 << 16
"""Texts that merges join and that are no tokens."""
MAX_WHOLE_CHARACTERS = 1 << 20
"""Characters of all control and user-defined tokens together; finding them in a text takes memory for each."""
MAX_TOKEN_CHARACTERS = 1 << 10
"""Longest token that is split into pairs, which costs the square of its length; longer ones match only whole."""
MAX_SPLIT_CHARACTERS = 1 << 22
"""Characters of all tokens that are split into pairs; Gemma 3 has 1.5 million in 262,144 tokens."""


class TokenizerError(ModelError):
    """No tokenizer can be made for this model, or it cannot do what is asked."""


GIVE_A_DIRECTORY = "Give the model's own tokenizer: a directory with its tokenizer.json (--tokenizer DIR)."


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, and the encoder that produces them.

    Attributes:
        backend: encodes text to ids; never produces a control token, adds no BOS.
        pieces: the bytes of each token, by id; empty for control tokens.
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
        TokenizerError: the kind is missing or unknown, or its rule that splits text is unknown.
        BundleError: a key has the wrong type.
    """
    kind = metadata.string("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        state = "is missing" if kind is None else f"is {kind[:80]!r}"
        raise TokenizerError(
            f"{metadata.path}: tokenizer.ggml.model {state}, expected 'llama' or 'gpt2'", GIVE_A_DIRECTORY
        )
    if kind == "gpt2":
        _pre(metadata, [])
    return kind


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read the vocabulary from the keys `tokenizer.ggml.*`.

    Raises:
        TokenizerError: it is of an unknown kind, incomplete, or contradicts itself; the message names the key.
        BundleError: a key has the wrong type.
    """
    kind = check_kind(metadata)
    limits = {"tokens": MAX_TOKENS, "token_type": MAX_TOKENS, "scores": MAX_TOKENS, "merges": MAX_MERGES}
    for key, most in limits.items():
        if (found := metadata.length(f"tokenizer.ggml.{key}") or 0) > most:
            raise _bad(metadata, key, f"expected up to {most}, found {found}")
    stated = metadata.strings("tokenizer.ggml.tokens")
    if not stated:
        raise _bad(metadata, "tokens", "expected one token or more, found none")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(stated)]
    names, notes = special_ids(metadata, kind, len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    stop = stop_ids(names, ids)
    types = _types(metadata, len(tokens))
    for text in end_texts(ids.keys()):
        types[ids[text]] = CONTROL
    for name in ("eos", "eot", "eom"):
        # Texts may need a token of one character; longer ones can be spelled.
        if name in names and len(tokens[names[name]]) > 1:
            types[names[name]] = CONTROL
    never = {token: i for token, i in ids.items() if types[i] in NEVER_TEXT}
    whole = [token for token, i in ids.items() if types[i] == USER_DEFINED]
    check_whole(f"{metadata.path}: tokenizer.ggml.tokens", (*never, *whole))
    byte_level = kind == "gpt2"
    pre = _pre(metadata, notes) if byte_level else ""
    texts = {token: i for token, i in ids.items() if token not in never}
    spelled = dict[int, Sequence[int]]()
    if byte_level:
        backend = _byte_level(metadata, texts, len(tokens), pre, spelled)
    else:
        unknown = tokens[names["unk"]] if "unk" in names else None
        backend = _sentencepiece(metadata, tokens, types, texts, unknown)
    blanks = swallowing(metadata, tokens, types)
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False, rstrip=ids[token] in blanks) for token in whole]
    )
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        add_bos = not byte_level or pre in WHOLE_WORDS_AND_BOS
    if add_bos and "bos" not in names:
        raise _bad(metadata, "bos_token_id", "missing, but every text is to have BOS")
    pieces = [piece(token, types[i], byte_level=byte_level) for i, token in enumerate(tokens)]
    return Vocabulary(backend, pieces, never, names, add_bos, stop, spelled, blanks, tuple(notes))


def check_whole(where: str, tokens: Iterable[str]) -> None:
    """Raise TokenizerError if tokens that are matched whole have too many characters."""
    if (found := sum(map(len, tokens))) > MAX_WHOLE_CHARACTERS:
        raise TokenizerError(
            f"{where}: control and user-defined tokens have {found} characters, more than {MAX_WHOLE_CHARACTERS}",
            GIVE_A_DIRECTORY,
        )


def _bad(metadata: Metadata, key: str, problem: str) -> TokenizerError:
    return TokenizerError(f"{metadata.path}: tokenizer.ggml.{key}: {problem}", GIVE_A_DIRECTORY)


def _types(metadata: Metadata, count: int) -> list[int]:
    types = metadata.integers("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if len(types) < count:
        raise _bad(metadata, "token_type", f"expected {count}, one for each token, found {len(types)}")
    return types[:count]


def _pre(metadata: Metadata, notes: list[str]) -> str:
    pre = metadata.string("tokenizer.ggml.pre")
    if not pre:
        notes.append("tokenizer.ggml.pre is missing: 'default' is taken, as by llama.cpp; answers may be worse")
        return "default"
    if pre not in SPLITS:
        raise TokenizerError(
            f"{metadata.path}: tokenizer.ggml.pre is {pre[:80]!r}; known are {', '.join(sorted(SPLITS))}",
            GIVE_A_DIRECTORY,
        )
    return pre


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[int], texts: dict[str, int], unknown: str | None
) -> Tokenizer:
    scores = metadata.reals("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        found = "none" if scores is None else len(scores)
        raise _bad(metadata, "scores", f"expected {len(tokens)}, one for each token, found {found}")
    vocabulary = texts if unknown is None or unknown in texts else texts | {unknown: tokens.index(unknown)}
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_of(metadata, tokens, types, scores, texts),
        unk_token=unknown,
        fuse_unk=False,
        byte_fallback=True,
        cache_capacity=0,
    )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if metadata.flag("tokenizer.ggml.add_space_prefix") is not False:
        steps.insert(0, normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def _merges_of(
    metadata: Metadata, tokens: list[str], types: list[int], scores: list[float], texts: dict[str, int]
) -> list[tuple[str, str]]:
    """Return the pairs that join to a token, best score first: BPE by scores, expressed as BPE by merges."""
    merges, characters, split = [], 0, 0
    for i, token in enumerate(tokens):
        if types[i] not in (NORMAL, USER_DEFINED, UNUSED) or len(token) > MAX_TOKEN_CHARACTERS:
            continue
        split += len(token)
        if split > MAX_SPLIT_CHARACTERS:
            raise _bad(metadata, "tokens", f"more than {MAX_SPLIT_CHARACTERS} characters in tokens of text")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in texts and right in texts:
                merges.append((-scores[i], i, texts[left], texts[right]))
                characters += len(token)
        _check_merges(metadata, "tokens", len(merges), characters)
    merges.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in merges]


def _check_merges(metadata: Metadata, key: str, count: int, characters: int) -> None:
    for found, most, what in (
        (count, MAX_MERGES, "merges"),
        (characters, MAX_MERGE_CHARACTERS, "characters in merges"),
    ):
        if found > most:
            raise _bad(metadata, key, f"more than {most} {what}")


def _byte_level(
    metadata: Metadata, texts: dict[str, int], count: int, pre: str, spelled: dict[int, Sequence[int]]
) -> Tokenizer:
    """Make the encoder. As in llama.cpp a merge may join to a text that is no token: that goes into `spelled`."""
    stated = metadata.strings("tokenizer.ggml.merges")
    if stated is None:
        raise _bad(metadata, "merges", f"expected up to {MAX_MERGES}, found none")
    _check_merges(metadata, "merges", len(stated), sum(map(len, stated)))
    vocabulary, merges = dict(texts), []
    for merge in stated:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            continue  # joins nothing
        for text in (left, right, left + right):
            if vocabulary.setdefault(text, count + len(spelled)) == count + len(spelled):
                spelled[count + len(spelled)] = [texts[each] for each in text if each in texts]
        if len(spelled) > MAX_UNNAMED:
            raise _bad(metadata, "merges", f"more than {MAX_UNNAMED} of the texts that they join are no tokens")
        merges.append((left, right))
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_WORDS_AND_BOS)
    backend = Tokenizer(model)
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    return backend
