"""Let llama.cpp split tricky texts by each of its names of splits, and keep the pieces for the tests.

    python scripts/golden/golden_splits.py FOLDER

FOLDER holds llama.cpp's shared libraries, built for the CPU. The vocabulary has every part of every text as a
token, and every merge that joins two parts to a third: a piece always becomes one token, so ids show the pieces.
The numbers go to `tests/tokenizer/golden_splits.json`:

    texts   the texts
    rules   for each different way to split: for each text the lengths of its pieces, in bytes
    names   name -> number of its way; whether a piece that is a token is not merged; whether a text begins with BOS
            if the file does not say, and if it says no; the id of BOS if the file names none, -1 for none
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf

from golden_logits import Llama
from llama_vocabulary import LlamaVocabulary
from q6k_kernels.tokenizer.pieces import SPACE, byte_level_token, token_of_byte
from q6k_kernels.tokenizer.splits import SPLITS

OUT = Path(__file__).parents[2] / "tests" / "tokenizer" / "golden_splits.json"
WHOLE = "QZ"
"""A token that no merge makes."""
NORMAL = 1
TEXTS = (
    "Hello world", " Hello  World!", "x   y", "   ", "a ", " \n", "\n\n\n a", "a\r\n\r\n  b", "\t\tx\t",
    " \n \n x\n", "a\x0b\x0c b", "a\u00a0b", "x\u3000\u3000y", "\u3000[", "\u1680<", " \u2028 z", "\u0085a",
    "I'm we've", "IT'S WE'LL", "x'Re'S'T", "'sx 'd", "'\u017f a", "don\u2019t", "''ll'VE", "it's's", "1234567",
    "12 345", "0", "1 22 333", "a1b22c4444", "3.14159", "12\u00b2345678", "\u0663\u0664\u0665\u0666\u0667",
    "\u00bd\u2460\u2167 IX", "x1234", "1234x", "-1,000,000", "123456", "12345 678", "aHTTPServer", "camelCaseX",
    "ABCdefGHI", "\u00c9COLE \u00c9t\u00e9", "\u00e9COLE", "stra\u00dfe\u00c4b", "\u043f\u0440\u041c\u0438",
    "\u01c5ena", "fa\u00e7ade", "e\u0301te\u0301", "\u0301a", "a\u0301\u0302!",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u17cb\u178f\u17c2", "\u0301", " \u0301x", "Z\u0351a",
    "\u4e2d\u6587abc", "abc\u4e2d\u6587", " \u4e2d1\u6587", "\u3072\u3089\u30ab\u30ca\u30fc",
    "\u4e2d\u306e\u30ab", "\ud55c\uad6d\uc5b4\u3131", "\u0e01\u0e02x", "\u1000\u1780\u0e81",
    "\u8c48\uf900\u3105", "\u9fa6\u3400\U00020000", "\u3007\u4e00", "\u4e2d\u3002\uff0c\u6587",
    "\uff11\uff12\uff13\uff21", "\u201c\u4e2d\u201d\u2026", "\u0964a\u06d4", "a.b,c!d", "!!!\n\nx", " ...x",
    "foo(bar);", "$x+=<y>^~|`", "a/b//c\n", " //\n/x", "#!/@", "_a_b-c", "\"q\" \\n", "@abc !d", ".net",
    "a & b", "\u20ac5 \u00a32", "\u2192x\u00b1", "a\u2014b", "\u00a7\u00b6\u00ab", "\U0001f600!",
    "a\U0001f468\u200d\U0001f469", "\u2705\ufe0f x", "\u200b\ufeffx", "\x01\x1c\x7f", "\ue000\U0010ffff",
    "\u0378x", "IMGIMGABZ", "IMGIMGJ", "<sentinel:12>", "    x  ", "word\n", "\nword", "x\n y", "a  \n", " \r",
    "a b c d", "x  1", "a\n\n1 \n2",
)  # fmt: skip


def probe(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return tokens and merges that make every part of every text one token.

    Args:
        texts: texts in the letters of the vocabulary, without spaces.
    """
    tokens, merges = dict[str, None](), dict[str, None]()
    for text in texts:
        for begin in range(len(text)):
            for end in range(begin + 1, len(text) + 1):
                tokens[text[begin:end]] = None
                for cut in range(begin + 1, end):
                    merges[f"{text[begin:cut]} {text[cut:end]}"] = None
    return [*tokens, WHOLE, *(letter for letter in WHOLE if letter not in tokens)], [*merges]


def write(path: Path, tokens: list[str], merges: list[str], **more: bool) -> None:
    """Write a GGUF file of a vocabulary alone; `more` are flags below `tokenizer.ggml`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "default")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    writer.add_array("tokenizer.ggml.merges", merges)
    for key, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def golden(llama: Llama, directory: Path) -> dict[str, Any]:
    """Return what is kept."""
    kept: dict[str, Any] = {"llama.cpp": llama.version, "texts": TEXTS, "rules": [], "names": {}}
    letters = {False: byte_level_token, True: lambda text: text.replace(" ", SPACE)}
    probes, silent, denying = dict[bool, list[str]](), dict[bool, Path](), dict[bool, Path]()
    for plain, written in letters.items():
        tokens, merges = probe(map(written, TEXTS))
        if plain:
            tokens += [token_of_byte(byte) for byte in range(256)]
        probes[plain] = tokens
        silent[plain], denying[plain] = directory / f"{plain}.gguf", directory / f"{plain}-no.gguf"
        write(silent[plain], tokens, merges)
        write(denying[plain], tokens[:300], merges[:1], add_bos_token=False)
    for name, split in SPLITS.items():
        tokens = probes[split.plain]
        vocabulary = LlamaVocabulary(llama, silent[split.plain], name)
        rule = [[_bytes(tokens[token], split.plain) for token in vocabulary.encode(text)] for text in TEXTS]
        for text, lengths in zip(TEXTS, rule, strict=True):
            if sum(lengths) != len(text.encode()):
                raise SystemExit(f"{name}: {text!r} has {len(text.encode())} bytes, and its pieces have {lengths}")
        if rule not in kept["rules"]:
            kept["rules"].append(rule)
        whole = len(vocabulary.encode(WHOLE)) == 1
        denied = LlamaVocabulary(llama, denying[split.plain], name)
        row = [kept["rules"].index(rule), whole, vocabulary.add_bos, denied.add_bos, vocabulary.bos]
        kept["names"][name] = row
        vocabulary.close()
        denied.close()
    return kept


def _bytes(token: str, plain: bool) -> int:
    """Return the number of a text's bytes in a token."""
    return len(token.replace(SPACE, " ").encode()) if plain else len(token)


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of libllama.so")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        kept = golden(Llama(args.folder), Path(directory))
    OUT.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{OUT.name}: {OUT.stat().st_size} bytes, {len(kept['names'])} names, {len(kept['rules'])} ways")


if __name__ == "__main__":
    main()
