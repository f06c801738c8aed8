"""Compare tokenizers with a source tree of llama.cpp: its vocabulary files, and its names of kinds and of splits.

    python scripts/golden/check_vocabularies.py LLAMA_CPP [--libraries FOLDER]

LLAMA_CPP is the source tree. Each `models/ggml-vocab-*.gguf` that has test texts (`.inp`) and their ids (`.out`)
must give these ids. With FOLDER, llama.cpp's shared libraries for the CPU, each must also give the ids that it
computes for more texts, the same bytes of tokens, the same ends of an answer and the same BOS. Every name of a kind
and of a split in `src/llama-vocab.cpp` must be known, or refused with a reason, which is printed. Exit code 1:
something differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from golden_logits import Llama
from golden_splits import TEXTS
from llama_vocabulary import LlamaVocabulary
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.tokenizer.kinds import KINDS, UNSUPPORTED
from q6k_kernels.tokenizer.splits import SPLITS, UNSUPPORTED_SPLITS
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from q6k_kernels.tokenizer.vocabulary import Vocabulary, read_vocabulary

BETWEEN = "\n__ggml_vocab_test__\n"
"""What parts the texts of an `.inp` file."""
FOR_TESTS = {"test"}
"""Kinds of vocabularies that no model has."""
RUNS = [letter * count for letter in (" ", "\n", "\t", "=", "0") for count in range(1, 70)]
UNSPELLED = b"[UNK_BYTE_"
"""What llama.cpp writes for a token of letters that stand for no byte, where we write the letters."""


def vectors(path: Path) -> list[tuple[str, list[int]]]:
    """Return the test texts of a vocabulary file with their ids; none if it has none."""
    texts, ids = Path(f"{path}.inp"), Path(f"{path}.out")
    if not texts.exists():
        return []
    with texts.open(encoding="utf-8", newline="") as file:
        found = file.read().split(BETWEEN)
    rows = ids.read_text(encoding="utf-8").splitlines()
    if len(found) == len(rows) + 1 and not found[-1]:
        found.pop()  # the last text may end like the others
    return [(text, [*map(int, row.split())]) for text, row in zip(found, rows, strict=True)]


def differences(vocabulary: Vocabulary, theirs: LlamaVocabulary, texts: list[str]) -> Iterator[str]:
    """Yield what differs from llama.cpp."""
    for text in texts:
        if (found := vocabulary.encode(text)) != (expected := theirs.encode(text)):
            yield f"{text[:60]!r}: expected {expected[:20]}, found {found[:20]}"
    pieces = [theirs.piece(token) for token in range(len(theirs))]
    for token, (expected_piece, piece) in enumerate(zip(pieces, vocabulary.pieces, strict=True)):
        if piece != expected_piece and not expected_piece.startswith(UNSPELLED):
            yield f"token {token}: expected {expected_piece!r}, found {piece!r}"
    facts = {
        "ends": (theirs.stop, vocabulary.stop),
        "control tokens that text can become": (set(), theirs.control - set(vocabulary.control.values())),
        "BOS": (theirs.bos, vocabulary.names.get("bos", -1)),
        "EOS": (theirs.eos, vocabulary.names.get("eos", -1)),
        "BOS before every text": (theirs.add_bos, vocabulary.add_bos),
    }
    for name, (expected_fact, fact) in facts.items():
        if expected_fact != fact:
            yield f"{name}: expected {expected_fact}, found {fact}"


def check_file(path: Path, llama: Llama | None) -> bool:
    """Print how a vocabulary file compares; return whether it does as it should."""
    metadata = read_metadata(path)
    try:
        vocabulary = read_vocabulary(metadata)
    except TokenizerError as error:
        print(f"{path.name}: {error.cause.removeprefix(f'{path}: ')}")
        return metadata.string("tokenizer.ggml.model") in UNSUPPORTED
    rows = vectors(path)
    wrong = [
        f"{text[:60]!r}: expected {ids[:20]}, found {found[:20]}"
        for text, ids in rows
        if (found := vocabulary.encode(text)) != ids
    ]
    if llama is not None:
        theirs = LlamaVocabulary(llama, path)
        texts = [text for text, _ in rows]
        wrong += differences(vocabulary, theirs, [*texts, *TEXTS, *RUNS, "".join(texts), " ".join(TEXTS)])
        theirs.close()
    print(f"{path.name}: {len(rows)} test texts, {len(wrong)} differences")
    for line in wrong[:10]:
        print(f"    {line}")
    return not wrong


def check_names(source: str) -> bool:
    """Print which names of llama.cpp's vocabularies are not known; return whether all are, or have a reason."""
    good = True
    for key, known, refused in (
        ("tokenizer_model", set(KINDS), UNSUPPORTED),
        ("tokenizer_pre", set(SPLITS), UNSUPPORTED_SPLITS),
    ):
        names = set(re.findall(rf'{key} == "([^"]+)"', source)) - FOR_TESTS
        unknown = sorted(names - known - set(refused))
        print(f"{key}: {len(names)} names, {len(names & known)} known, {len(names & set(refused))} refused")
        for name in sorted(names & set(refused)):
            print(f"    {name}: {refused[name]}")
        for name in unknown:
            print(f"    {name}: UNKNOWN")
        good &= not unknown
    return good


def main() -> int:
    """Check everything; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tree", type=Path, metavar="LLAMA_CPP", help="llama.cpp's source tree")
    parser.add_argument("--libraries", type=Path, metavar="FOLDER", help="folder of its libllama.so")
    args = parser.parse_args()
    llama = Llama(args.libraries) if args.libraries else None
    files = sorted((args.tree / "models").glob("ggml-vocab-*.gguf"))
    if not files:
        parser.error(f"{args.tree}/models has no ggml-vocab-*.gguf")
    good = [check_file(path, llama) for path in files]
    good.append(check_names((args.tree / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")))
    print("as in llama.cpp" if all(good) else "DIFFERENT")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
