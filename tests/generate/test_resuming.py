"""A text that begins like the one before: only what differs is processed, and the result is that of all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from families import PROMPT, VOCABULARY, expected, prompt, tiny

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from q6k_kernels.generate import mailbox
from q6k_kernels.generate.checking import CapacityError
from q6k_kernels.generate.generator import TAIL, Generator
from q6k_kernels.models.cache_layout import SLACK


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def lag(monkeypatch: pytest.MonkeyPatch) -> int:
    """Read tokens late, as on a GPU, so that steps run in vain."""
    monkeypatch.setattr(mailbox.Mailbox, "lag", 8)
    return 8


def other(length: int, seed: int = 9) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def resumed(generator: Generator, family: str, ids: list[int]) -> int:
    """Return the tokens that were reused; the logits must be those of the whole text."""
    found = generator.resume(ids)
    torch.testing.assert_close(found, tiny(family)(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=0)
    assert generator.length == len(ids)
    return generator.reused


def answered(family: str, count: int, *, fused: bool = False) -> tuple[Generator, list[int]]:
    """Return a generator after an answer that the host broke off, and the text."""
    generator = Generator(tiny(family), capacity=400, fused=fused)
    generator.resume(prompt())
    assert generator.reused == 0
    tokens = generator.generate(count + 20)
    answer = [next(tokens) for _ in range(count)]
    tokens.close()
    assert answer == expected(family)[:count]
    return generator, prompt() + answer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen35"])
def test_the_next_turn_goes_on_behind_the_answer(family: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        monkeypatch.setattr(mailbox.Mailbox, "lag", 0)  # as on the CPU
    generator, text = answered(family, 40, fused=fused)
    longer = text + other(9)
    # The last token of an answer was chosen, but not processed. States are copied now and then.
    reused = resumed(generator, family, longer)
    assert reused == len(text) - 1 if family != "qwen35" else PROMPT - TAIL <= reused < len(text)
    answer = list(generator.generate(10))
    whole = Generator(tiny(family), capacity=400)
    whole.prefill(longer)
    assert list(whole.generate(10)) == answer
    assert resumed(generator, family, longer + answer + other(3, 1)) > reused


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen35"])
def test_a_turn_that_is_written_anew_goes_back_to_where_it_differs(family: str, fused: bool) -> None:
    """As where a template drops what the model was thinking: all of the answer differs, however long."""
    generator, text = answered(family, 60, fused=fused)
    generator.resume(text + other(40))
    assert len(list(generator.generate(140))) == 140  # more than all copies of states reach back
    begin = len(text) + 40 - 4  # the template ended with the beginning of an answer
    again = (text + other(40))[:begin] + other(30, 2)
    reused = resumed(generator, family, again)
    assert reused == (begin if family == "llama" else len(text) + 40 - TAIL)
    # And once more, to before that.
    assert resumed(generator, family, prompt()[:7] + other(50, 3)) == (7 if family == "llama" else 0)


@pytest.mark.parametrize(("family", "fused"), [("gemma3", False), ("gemma3", True), ("mistral", False)])
def test_a_ring_goes_back_as_far_as_it_holds_what_a_window_needs(family: str, fused: bool, lag: int) -> None:
    """Further back everything is processed again."""
    back = SLACK - 2 * lag - 1
    for far in (back, SLACK + 9):
        generator = Generator(tiny(family), capacity=400, fused=fused)
        text = prompt(300)
        generator.prefill(text)
        tokens = generator.generate(30)
        text += [next(tokens) for _ in range(20)]
        tokens.close()
        begin = len(text) - far
        assert resumed(generator, family, text[:begin] + other(5)) == (begin if far == back else 0)
        # The ring still holds the later positions of the text before: going back further must see that.
        assert resumed(generator, family, text[: begin - 30] + other(2, 4)) in (0, begin - 30)


def test_a_small_cache_holds_everything_and_goes_back_anywhere() -> None:
    generator = Generator(tiny("gemma3"), capacity=64)
    generator.prefill(prompt(60))
    assert resumed(generator, "gemma3", prompt(60)[:3] + other(50)) == 3


@pytest.mark.parametrize("family", ["llama", "qwen35"])
def test_the_same_text_again_and_a_shorter_one(family: str) -> None:
    generator, text = answered(family, 5)
    for ids, most in ((text, len(text) - 1), (text, len(text) - 1), (text[:12], 11), (prompt(), 12)):
        reused = resumed(generator, family, ids)
        assert reused == most if family == "llama" else reused <= most


def test_a_text_after_reset_begins_anew() -> None:
    generator, text = answered("llama", 5)
    generator.reset()
    assert resumed(generator, "llama", text) == 0
    with pytest.raises(CapacityError, match="401 tokens, and the cache holds 400"):
        generator.resume(text + other(401 - len(text)))
    with pytest.raises(ValueError, match="ids: expected one or more of 0 to 96, found none"):
        generator.resume([])
