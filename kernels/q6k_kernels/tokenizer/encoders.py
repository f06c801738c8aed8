"""Encoders: what turns a text into token ids, made of a vocabulary and its merges or scores.

An encoder, from the package `tokenizers`, does not know control tokens, so no text becomes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.tokenizer.pieces import SPACE, token_of_byte
from q6k_kernels.tokenizer.special import NORMAL, UNUSED, USER_DEFINED
from q6k_kernels.tokenizer.splits import Split
from q6k_kernels.tokenizer.tokenizer_error import vocabulary_error

MAX_MERGES = 3 << 18
MAX_MERGE_CHARACTERS = 1 << 25
"""Characters of all merges together."""
MAX_UNNAMED = 1 << 16
"""Texts that merges join and that are no tokens."""
MAX_TOKEN_CHARACTERS = 1 << 10
"""Longest token that is split into pairs, which costs the square of its length; longer ones match only whole."""
MAX_SPLIT_CHARACTERS = 1 << 22
"""Characters of all tokens that are split into pairs; Gemma 3 has 1.5 million in 262,144 tokens."""


def encoder_of_scores(
    metadata: Metadata, tokens: Sequence[str], types: Sequence[int], texts: dict[str, int], unknown: str | None
) -> Tokenizer:
    """Make the encoder of a vocabulary with scores (SentencePiece's BPE).

    Args:
        metadata: the scores, and whether a text begins with a space.
        tokens: all tokens.
        types: the type of each.
        texts: token -> id, of those that text can become.
        unknown: the token for characters that have none.

    Raises:
        TokenizerError: scores are missing, or pairs of tokens exceed a limit.
    """
    scores = metadata.reals("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        found = "none" if scores is None else len(scores)
        raise vocabulary_error(metadata, "scores", f"expected {len(tokens)}, one for each token, found {found}")
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


def encoder_of_merges(
    metadata: Metadata, texts: Mapping[str, int], count: int, split: Split
) -> tuple[Tokenizer, dict[int, Sequence[int]]]:
    """Make the encoder of a vocabulary with merges.

    As in llama.cpp a merge may join to a text that is no token, and is then spelled by tokens of its parts.

    Args:
        metadata: the merges.
        texts: token -> id, of those that text can become.
        count: number of all tokens.
        split: how texts are split, and what tokens are made of.

    Returns:
        The encoder, and ids of it that are no tokens -> the tokens that spell them.

    Raises:
        TokenizerError: merges are missing, or exceed a limit.
    """
    stated = metadata.strings("tokenizer.ggml.merges")
    if stated is None:
        raise vocabulary_error(metadata, "merges", f"expected up to {MAX_MERGES}, found none")
    _check_merges(metadata, "merges", len(stated), sum(map(len, stated)))
    vocabulary, merges, spelled = dict(texts), list[tuple[str, str]](), dict[int, Sequence[int]]()
    for merge in stated:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            continue  # joins nothing
        for text in (left, right, left + right):
            if vocabulary.setdefault(text, count + len(spelled)) == count + len(spelled):
                parts = map(token_of_byte, text.encode()) if split.plain else text
                spelled[count + len(spelled)] = [texts[each] for each in parts if each in texts]
        if len(spelled) > MAX_UNNAMED:
            problem = f"more than {MAX_UNNAMED} of the texts that they join are no tokens"
            raise vocabulary_error(metadata, "merges", problem)
        merges.append((left, right))
    model = models.BPE(
        vocab=vocabulary, merges=merges, ignore_merges=split.whole, byte_fallback=split.plain, **_cache(split)
    )
    backend = Tokenizer(model)
    if split.plain:
        backend.normalizer = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [pre_tokenizers.Split(Regex(step), "isolated") for step in split.steps]
    if not split.plain:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend, spelled


def _cache(split: Split) -> dict[str, int]:
    # Plain text is merged along whole lines, which do not repeat: to remember them is of no use.
    return {"cache_capacity": 0} if split.plain else {}


def _merges_of(
    metadata: Metadata,
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    texts: Mapping[str, int],
) -> list[tuple[str, str]]:
    """Return the pairs that join to a token, best score first: BPE by scores, expressed as BPE by merges."""
    merges, characters, split = [], 0, 0
    for i, token in enumerate(tokens):
        if types[i] not in (NORMAL, USER_DEFINED, UNUSED) or len(token) > MAX_TOKEN_CHARACTERS:
            continue
        split += len(token)
        if split > MAX_SPLIT_CHARACTERS:
            problem = f"more than {MAX_SPLIT_CHARACTERS} characters in tokens of text"
            raise vocabulary_error(metadata, "tokens", problem)
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
            raise vocabulary_error(metadata, key, f"more than {most} {what}")
