"""Let a model answer: tokens to text as they come, up to a stop token, a stop text or an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.run.stop_texts import StopTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from q6k_kernels.generate.generator import Generator
    from q6k_kernels.generate.likelihoods import Likelihood
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer


@dataclass
class Answer:
    """An answer.

    Attributes:
        tokens: its tokens, without one that ended it.
        text: its text, up to a stop text.
        stop_reason: "stop" after a stop token or text, "length", or "interrupted".
        stop_text: the stop text that ended it, or None.
        steps: decoding steps that were read; the first token comes from the prompt.
        seconds: seconds that decoding took.
        likelihoods: how likely the model found each token, if they were asked for.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stop_reason: str | None = None
    stop_text: str | None = None
    steps: int = 0
    seconds: float = 0.0
    likelihoods: list[Likelihood] | None = None

    @property
    def rate(self) -> float | None:
        """Decoded tokens a second; None where there was no step."""
        return self.steps / self.seconds if self.steps > 0 and self.seconds > 0 else None


class Writing:
    """An answer whose tokens become text as they come.

    Attributes:
        answer: the answer so far.

    Args:
        tokenizer: the tokenizer.
        stop: texts that end it.
        write: called with each piece.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], write: Callable[[str], object] = lambda _: None
    ) -> None:
        self.answer = Answer()
        self._stops, self._stream, self._write = StopTexts(stop), tokenizer.stream(), write

    def push(self, token: int) -> bool:
        """Add a token; return whether a stop text was found."""
        self.answer.tokens.append(token)
        self._put(self._stops.push(self._stream.push(token)))
        return self._stops.found is not None

    def end(self, reason: str, *, complete: bool) -> Answer:
        """Return the answer.

        Args:
            reason: why its tokens ended.
            complete: whether no more of them could come.
        """
        if complete:
            self._put(self._stops.push(self._stream.end()))
        self.answer.stop_text = self._stops.found
        self.answer.stop_reason = "stop" if self._stops.found is not None else reason
        self._put(self._stops.end())
        return self.answer

    def _put(self, piece: str) -> None:
        if piece:
            self.answer.text += piece
            self._write(piece)


class Answering:
    """A generator with what turns its tokens into text, and ends an answer.

    Attributes:
        generator: the generator.

    Args:
        generator: the generator.
        tokenizer: the tokenizer.
        model: the model, whose configuration may name further stop tokens.
        stop: texts that end an answer.
        write: called with each piece of the answer.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        model: PreTrainedModel,
        stop: tuple[str, ...],
        write: Callable[[str], None],
    ) -> None:
        self.generator, self._tokenizer, self._write = generator, tokenizer, write
        self._stop_ids, self._stop = stop_ids(tokenizer, model), stop

    def prepare(self, prompt: list[int], tokens: int | None = None) -> None:
        """Compile kernels and record the steps of an answer of so many tokens, so that no timing counts it.

        Without a number the steps of all answers are recorded that the cache has room for: else a long conversation
        would stop for that in the middle of an answer.
        """
        self.generator.prefill(prompt)
        self.generator.prepare(tokens)
        self.generator.reset()

    def answer(self, most: int, stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Generate an answer of at most so many tokens to the text that the generator has read.

        Args:
            most: 1 or more.
            stopped: asked after each token whether the answer has to end.
        """
        writing = Writing(self._tokenizer, self._stop, self._write)
        generator, begin, complete = self.generator, self.generator.length, False
        start = time.perf_counter()
        tokens = generator.generate(most, self._stop_ids)
        for token in tokens:
            if writing.push(token) or stopped():
                break
        else:
            complete = True
        tokens.close()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
        answer = writing.end(generator.stop_reason or "interrupted", complete=complete)
        answer.seconds = seconds
        answer.steps = len(answer.tokens) - 1 + (generator.stop_reason == "stop")
        if generator.likelihoods is not None:
            answer.likelihoods = generator.likelihoods.read(begin, answer.tokens)
        return answer

    def shown(self, likelihoods: list[Likelihood]) -> list[dict[str, Any]]:
        """Return likelihoods for a document, with the texts of the tokens."""
        return [
            {
                **self._token(each.token, each.logprob),
                "likeliest": [self._token(token, logprob) for token, logprob in each.likeliest],
            }
            for each in likelihoods
        ]

    def lines(self, likelihoods: list[Likelihood]) -> list[str]:
        """Return likelihoods as lines for people."""

        def words(token: int, logprob: float) -> str:
            return f"{logprob:.4f} {self._tokenizer.decode([token])!r}"

        rows = [[(each.token, each.logprob), *each.likeliest] for each in likelihoods]
        return ["  ".join(f"{words(*pair):<24}" for pair in row).rstrip() for row in rows]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        # The logarithm of a probability that is 0 in float32 is no number of JSON.
        finite = logprob if logprob > float("-inf") else None
        return {"token_id": token, "text": self._tokenizer.decode([token]), "logprob": finite}


def stop_ids(tokenizer: Tokenizer, model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end an answer, by the tokenizer or the model's configuration."""
    ends = model.generation_config.eos_token_id
    return tokenizer.stop_ids | frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def rated(answer: Answer) -> str:
    """Return the speed of an answer, or nothing where it has none."""
    return f", {answer.rate:.1f} tokens/s" if answer.rate is not None else ""


def counted(answer: Answer) -> str:
    """Return the length of an answer."""
    return text.plural(len(answer.tokens), "token")
