r"""The rules that split a text before merging, by `tokenizer.ggml.pre`, as llama.cpp defines them.

Each piece is merged by itself. An expression splits a text into its matches and what lies between them; all are in
Oniguruma's syntax, and take time in proportion to the text. Where llama.cpp's rule is simpler than the one of a
model's own tokenizer (it may know the case of ASCII letters only), llama.cpp's counts: files are made for it. Its
table of Unicode is older, and has no class for characters assigned since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Split:
    """What a name says about its vocabularies.

    Attributes:
        steps: expressions; each splits the pieces of the one before.
        whole: whether a piece that is a token is not merged.
        bos: whether every text begins with BOS where the file does not say.
        always_bos: whether it does so whatever the file says.
        default_bos: whether a file that names no BOS has that of its kind.
        plain: whether tokens are plain text, with "▁" for a space and `<0xNN>` for a byte; else each byte of a text
            is a character.
    """

    steps: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    always_bos: bool = False
    default_bos: bool = True
    plain: bool = False


_SUFFIX = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_WORD = rf"{_BEFORE_WORD}\p{{L}}+"
_MARKED_WORD = rf"{_BEFORE_WORD}[\p{{L}}\p{{M}}]+"
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_MARKED_UPPER, _MARKED_LOWER = r"[\p{L}\p{M}&&[^a-z]]", r"[\p{L}\p{M}&&[^A-Z]]"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_OTHER = r" ?[^\s\p{L}\p{N}]+"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"


def _one_of(*alternatives: str) -> str:
    return "|".join(alternatives)


def _cased(upper: str, lower: str, suffix: str = "") -> str:
    """Return the expression of a word that ends before a capital behind a small letter."""
    return _one_of(rf"{_BEFORE_WORD}{upper}*{lower}+{suffix}", rf"{_BEFORE_WORD}{upper}+{lower}*{suffix}")


def _general(word: str, digits: str, other: str = rf"{_OTHER}[\r\n]*", lines: str = _LINES) -> str:
    """Return the rule of most vocabularies since GPT-4: words, digits, other characters, ends of lines, spaces."""
    return _one_of(word, digits, other, lines, _SPACES)


_GPT2 = _one_of("'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", _OTHER, _SPACES)
_LLAMA3 = _general(_one_of(_SUFFIX, _WORD), _DIGITS)
_QWEN2 = _general(_one_of(_SUFFIX, _WORD), _DIGIT)
_QWEN35 = _general(_one_of(_SUFFIX, _MARKED_WORD), _DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")
_PATHS = rf"{_OTHER}[\r\n/]*"
_TEKKEN = _general(_cased(_UPPER, _LOWER), _DIGIT, _PATHS)
_GPT4O = _general(_cased(_UPPER, _LOWER, f"(?:{_SUFFIX})?"), _DIGITS, _PATHS)
# Runs of spaces are cut, so the rest of a run is not searched for an end of a line again, which it cannot have.
_JAIS2 = _one_of(
    _SUFFIX, _WORD, _DIGITS, rf"{_OTHER}[\r\n]*", rf"(?<![^\S\r\n]){_LINES}",
    *(rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")), r"\s",
)  # fmt: skip
_EXAONE_MOE = _general(
    _one_of(_SUFFIX, rf"{_BEFORE_WORD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"),
    _DIGIT,
    rf"{_OTHER}[\r\n/]?",
    r"\s*[\r\n]",
)

_ASCII_MARKS = r"[!-/:-@\[-`{-~]"
_HAN_AND_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+"
_DEEPSEEK3_WORDS = _one_of(rf"{_ASCII_MARKS}[A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+")
_DEEPSEEK3_LAST = _one_of(_DEEPSEEK3_WORDS, r" ?[\p{P}\p{S}]+[\r\n]*", _LINES, _SPACES)
_SPARK = _one_of(_DEEPSEEK3_WORDS, r" ?[\p{P}\p{S}]+", r"[\r\n]", _SPACES)
_DEEPSEEK_WIDE = r"[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}&&[^\s]]+"
# Letters with case, without scripts that came to Unicode late or are rare.
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8f}\x{2d00}-\x{2d2f}\x{a78f}-\x{a7ff}"
    r"\x{ab30}-\x{ab6f}\x{10570}-\x{105bf}\x{10d40}-\x{10d8f}\x{16e40}-\x{16fff}\x{1d400}-\x{1dfff}]]"
)
# At the end of a piece; the look back keeps a long run of spaces from being tried at each of them.
_SPACES_AT_END = r"(?<!\s)\s++\z"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_DEEPSEEK_LETTERS}+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3001}\x{3002}]+",
    _SPACES_AT_END,
    _DEEPSEEK_WIDE,
    r"\p{N}+",
)

_HAN = (
    r"\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}\x{20000}-\x{2a6df}\x{2a700}-\x{2ebef}\x{2f800}-\x{2fa1f}"
)
_KIMI = _general(_one_of(rf"[{_HAN}]+", rf"{_BEFORE_WORD}[\p{{L}}&&[^{_HAN}]]+(?:{_SUFFIX})?"), _DIGITS)
# Digits in threes, counted from a number's end; its first piece has the text before it, too.
_THREES = r"(?:\A|\P{N}++)(?:\p{N}{1,2}(?=(?:\p{N}{3})*+(?!\p{N}))|\p{N}{3})|\p{N}{3}|\P{N}++"
# The same among other numbers, for digits of ASCII: a number of one or two stays with what is around it.
_STAYS = r"(?:[^0-9]++|(?<![0-9])[0-9]{1,2}(?![0-9]))++"
_FIRST = r"(?<![0-9])[0-9]{1,2}(?=(?:[0-9]{3})++(?![0-9]))"
_SUPERBPE = rf"\A(?:{_STAYS}(?:{_FIRST})?|{_FIRST})|[0-9]{{3}}(?:{_STAYS}(?:{_FIRST})?)?"
_ASIAN = (
    r"[\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{8c48}-\x{faff}\x{3040}-\x{30ff}\x{ff65}-\x{ff9f}\x{2f00}-\x{2fdf}"
    r"\x{e40}-\x{eff}\x{1780}-\x{17ff}\x{1000}-\x{109f}\x{1100}-\x{11ff}]+"
)
_YOUTU = _one_of(
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+",
    r"[\x{2014}\x{2018}\x{2019}\x{201c}\x{201d}\x{2026}\x{3001}-\x{303f}\x{fe30}-\x{fe4f}\x{ff01}\x{ff0c}\x{ff1a}\x{ff1b}]+",
    r"[\x{3105}-\x{312f}]+", _HAN_AND_KANA,
)  # fmt: skip
_MARKED_WORDS = rf"{_MARKED_WORD}(?:{_SUFFIX})?"
_NO_STOPS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+"
_GRANITE = _general(_cased(_MARKED_UPPER, _MARKED_LOWER, f"(?:{_SUFFIX})?"), _DIGITS, _PATHS)
_BAILING = _general(_one_of("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _WORD), _DIGIT, lines=r"\s*[\r\n]")
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    _DIGIT,
    rf"[\p{{P}}{_ASCII_MARKS[1:]}",
    _GPT2,
)
_RUNS_OF_LINES = r"[^\n]+|\n+"

_DEFAULT = Split((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_BY_GPT2 = Split((_GPT2,))
_BY_DIGIT = Split((_DIGIT, _GPT2))
_BY_QWEN2 = Split((_QWEN2,))
_BY_LLAMA3 = Split((_LLAMA3,))

_ROWS: tuple[tuple[str, Split], ...] = (
    ("default", _DEFAULT),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        replace(_BY_LLAMA3, whole=True, bos=True),
    ),
    ("smaug-bpe dbrx", _BY_LLAMA3),
    ("chatglm-bpe", replace(_BY_LLAMA3, default_bos=False)),
    ("glm4 glm5", replace(_BY_LLAMA3, default_bos=False, whole=True)),
    ("jais-2", Split((_JAIS2,))),
    ("minicpm5", Split((_DIGITS, _general(_one_of(_SUFFIX, _WORD), r"\p{N}+")), whole=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _BY_QWEN2),
    ("qwen35", Split((_QWEN35,))),
    ("ufakzeka", Split((_general(_WORD, _DIGIT),))),
    ("laguna", Split((_RUNS_OF_LINES, _QWEN2))),
    ("seed-coder", Split((_general(_one_of(_SUFFIX, _WORD), _DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("bailingmoe bailingmoe2 llada-moe", Split((_BAILING,))),
    ("exaone-moe", Split((_EXAONE_MOE,))),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4 modern-bert"
        " jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe",
        _BY_GPT2,
    ),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _BY_DIGIT),
    ("falcon", Split((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("tekken", Split((_TEKKEN,), whole=True, bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Split((_GPT4O,))),
    ("granite-embed-multi-97m", Split((_GRANITE,), whole=True)),
    ("tiny_aya cohere2moe", Split((_THREES, _general(_MARKED_WORDS, _DIGITS, _PATHS)))),
    ("youtu", Split((_YOUTU, _general(_MARKED_WORDS, _DIGIT, _PATHS)), whole=True)),
    ("deepseek-llm", Split(_DEEPSEEK_LLM)),
    ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_WIDE, _DIGIT))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Split((_DIGITS, _HAN_AND_KANA, _DEEPSEEK3_LAST))),
    ("spark2_5", Split((_DIGITS, _HAN_AND_KANA, _SPARK, _DIGIT))),
    ("afmoe", Split((_THREES, _ASIAN, _DEEPSEEK3_LAST))),
    ("superbpe", Split((r"\p{N}+", _SUPERBPE))),
    ("kimi-k2", Split((_KIMI,))),
    ("poro-chat bloom gpt3-finnish", Split((_NO_STOPS,))),
    ("viking", Split((_NO_STOPS, _DIGIT))),
    ("chameleon", Split(_CHAMELEON, bos=True)),
    ("gemma4 granite-embed-multi-311m", Split((_RUNS_OF_LINES,), always_bos=True, plain=True)),
    ("sarvam-moe", Split((_RUNS_OF_LINES,), plain=True)),
)


def _by_name(rows: Iterable[tuple[str, Split]]) -> dict[str, Split]:
    return {name: split for names, split in rows for name in names.split()}


SENTENCEPIECE = Split((), bos=True, plain=True)
"""Texts are not split, and spaces are "▁": vocabularies with scores."""
SPLITS: Mapping[str, Split] = _by_name(_ROWS)
"""`tokenizer.ggml.pre` -> its rule."""

UNSUPPORTED_SPLITS: Mapping[str, str] = {
    "whitespace": "words between spaces, of models that embed texts and write none",
}
"""`tokenizer.ggml.pre` -> what it is, and why it is not read."""
