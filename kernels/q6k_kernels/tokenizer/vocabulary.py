"""The vocabulary in a GGUF file: from text to token ids, and from an id to bytes.

`tokenizer.ggml.model` names one of two kinds:

    llama   SentencePiece's BPE: scores instead of merges, spaces as "▁", bytes without a token as <0xNN>
    gpt2    byte-level BPE: merges; `tokenizer.ggml.pre` names the rule that splits text before merging

Where a file is silent, llama.cpp's defaults apply, as llama.cpp defines the format. The encoder, from the package
`tokenizers`, never turns text into a control token; callers insert those by id. User-defined tokens (runs of spaces
or newlines in Gemma) are always matched whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from q6k_kernels.bundle.metadata import ENDS, Metadata, token_id_key
from q6k_kernels.errors import ModelError

MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 21
MAX_TOKEN_CHARACTERS = 1 << 10
"""Longest token that is split into pairs, which costs the square of its length; longer ones match only whole."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
# llama.cpp's fallback for files that name no rule it knows: these splits, one after the other.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3,)),
    "smaug-bpe": (_LLAMA3,),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "stablelm2": (_QWEN2,),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    "smollm": (r"\p{N}", _GPT2),
    "default": _DEFAULT,
}
"""`tokenizer.ggml.pre` -> expressions that split text; each splits the pieces of the one before."""
_WHOLE_WORDS_AND_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3")

# Control tokens that end an answer, whatever the file's `eos_token_id` says.
_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}


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
        add_bos, add_eos: whether every text begins with BOS, or ends with EOS.
        stop: ids that end an answer.
    """

    backend: Tokenizer
    pieces: Sequence[bytes]
    control: dict[str, int]
    names: dict[str, int]
    add_bos: bool
    add_eos: bool
    stop: frozenset[int]


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read the vocabulary from the keys `tokenizer.ggml.*`.

    Raises:
        TokenizerError: it is of an unknown kind, incomplete, or contradicts itself; the message names the key.
        BundleError: a key has the wrong type.
    """
    kind = metadata.string("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        found = "is missing" if kind is None else f"is {kind!r}"
        raise TokenizerError(
            f"{metadata.path}: tokenizer.ggml.model {found}, expected 'llama' or 'gpt2'", GIVE_A_DIRECTORY
        )
    tokens = metadata.strings("tokenizer.ggml.tokens") or []
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise _bad(metadata, "tokens", f"expected 1 to {MAX_TOKENS} tokens, found {len(tokens)}")
    types = _types(metadata, len(tokens))
    byte_level = kind == "gpt2"
    pre = metadata.string("tokenizer.ggml.pre") if byte_level else None
    backend = _byte_level(metadata, tokens, pre) if byte_level else _sentencepiece(metadata, tokens, types)
    control = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, UNKNOWN) and token}
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    whole = [token for token, kind_of in zip(tokens, types, strict=True) if kind_of == USER_DEFINED and token]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    backend.encode_special_tokens = True
    names = _names(metadata, len(tokens))
    stop = {names[name] for name in ENDS if name in names}
    stop |= {i for token, i in control.items() if token in _ENDS}
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        add_bos = not byte_level or pre in _WHOLE_WORDS_AND_BOS
    add_eos = bool(metadata.flag("tokenizer.ggml.add_eos_token"))
    for name, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and name not in names:
            raise _bad(metadata, f"{name}_token_id", f"missing, but every text is to have {name.upper()}")
    pieces = [_piece(token, types[i], byte_level=byte_level) for i, token in enumerate(tokens)]
    return Vocabulary(backend, pieces, control, names, add_bos, add_eos, frozenset(stop))


def _bad(metadata: Metadata, key: str, problem: str) -> TokenizerError:
    return TokenizerError(f"{metadata.path}: tokenizer.ggml.{key}: {problem}", GIVE_A_DIRECTORY)


def _types(metadata: Metadata, count: int) -> list[int]:
    types = metadata.integers("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if len(types) != count:
        raise _bad(metadata, "token_type", f"expected {count}, one for each token, found {len(types)}")
    return types


def _names(metadata: Metadata, count: int) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    names = dict[str, int]()
    for name, key in keys.items():
        found = metadata.integer(token_id_key(key))
        if found is None:
            continue
        if not 0 <= found < count:
            raise _bad(metadata, f"{key}_token_id", f"expected 0 to {count - 1}, found {found}")
        names[name] = found
    return names


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = metadata.reals("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        found = "none" if scores is None else len(scores)
        raise _bad(metadata, "scores", f"expected {len(tokens)}, one for each token, found {found}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.integer(token_id_key("unknown"))
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_of(metadata, tokens, types, scores, vocabulary),
        unk_token=tokens[unknown] if unknown is not None and 0 <= unknown < len(tokens) else None,
        fuse_unk=False,
        byte_fallback=True,
        cache_capacity=0,
    )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if metadata.flag("tokenizer.ggml.add_space_prefix") is not False:
        steps.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def _merges_of(
    metadata: Metadata, tokens: list[str], types: list[int], scores: list[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Return the pairs that join to a token, best score first: BPE by scores, expressed as BPE by merges."""
    merges = []
    for i, token in enumerate(tokens):
        if types[i] not in (NORMAL, USER_DEFINED, UNUSED) or len(token) > MAX_TOKEN_CHARACTERS:
            continue
        for cut in range(1, len(token)):
            left = vocabulary.get(token[:cut])
            if left is None:
                continue
            right = vocabulary.get(token[cut:])
            if right is not None:
                merges.append((-scores[i], i, left, right))
        if len(merges) > MAX_MERGES:
            raise _bad(metadata, "tokens", f"more than {MAX_MERGES} pairs of tokens make another")
    merges.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in merges]


def _byte_level(metadata: Metadata, tokens: list[str], pre: str | None) -> Tokenizer:
    if pre not in SPLITS:
        found = "is missing" if pre is None else f"is {pre!r}"
        raise TokenizerError(
            f"{metadata.path}: tokenizer.ggml.pre {found}; known are {', '.join(sorted(SPLITS))}", GIVE_A_DIRECTORY
        )
    stated = metadata.strings("tokenizer.ggml.merges")
    if stated is None or len(stated) > MAX_MERGES:
        found = "none" if stated is None else f"{len(stated)}"
        raise _bad(metadata, "merges", f"expected up to {MAX_MERGES}, found {found}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i, merge in enumerate(stated):
        pair = merge.split(" ")
        if len(pair) != 2 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise _bad(metadata, "merges", f"merge {i}, {merge[:100]!r}, does not join two tokens into a third")
        merges.append((pair[0], pair[1]))
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_AND_BOS)
    backend = Tokenizer(model)
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    return backend


def _byte_alphabet() -> dict[str, int]:
    """Return the character -> byte map of byte-level vocabularies: printable bytes stand for themselves."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(themselves)]
    return {chr(byte): byte for byte in themselves} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def byte_level_piece(token: str) -> bytes:
    """Return the bytes of a byte-level token, or its UTF-8 text if it has characters outside that alphabet."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def sentencepiece_piece(token: str) -> bytes:
    """Return the bytes of a SentencePiece token."""
    return token.replace(_SPACE, " ").encode()


def byte_token(token: str) -> bytes | None:
    """Return the byte that a token `<0xNN>` stands for; None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None


def _piece(token: str, kind: int, *, byte_level: bool) -> bytes:
    if kind in (CONTROL, UNKNOWN):
        return b""
    if kind == BYTE and (byte := byte_token(token)) is not None:
        return byte
    if byte_level:
        return token.encode() if kind == USER_DEFINED else byte_level_piece(token)
    return sentencepiece_piece(token)
