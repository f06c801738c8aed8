"""Several texts that a model continues at once, each with its own length, sampling and end.

    texts = Texts(model, places=8, capacity=2048)
    text = texts.join(ids, 100, stop={2}, temperature=0.7, seed=5)
    while texts.here:
        for text, token in texts.step(): ...   # token is None once a text has ended

A step processes the last tokens of all texts together, so weights are read once for all of them. Texts join and
leave between steps: each has a place in the cache, and its prompt goes through the model alone. Steps are of 1, 2,
4, 8, 16 or 32 rows. Rows beyond the texts are of places without one, where they rewrite the first slot.

As in `generator`, tokens are read a few steps late on a GPU. So a text that ends with a stop token takes part in a
few steps in vain; one that ends at its limit does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate.cache_codes import CacheType
from q6k_kernels.generate.checking import check_finite, check_ids, check_room
from q6k_kernels.generate.filters import LIMIT, Filters, FiltersOfTexts
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.mailbox import GpuStepsMailbox, StepsMailbox
from q6k_kernels.generate.recording import Recorder
from q6k_kernels.generate.sampling import settled, suppression
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.generate.stepping import step_for
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.models.architecture import LINEAR
from q6k_kernels.models.cache_layout import CHUNK
from q6k_kernels.models.ranks import is_divided
from q6k_kernels.models.rotary import plan_for, rotaries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TEXTS = 32
ONE_BY_ONE = "Generate the texts one after the other."
ROWS = (1, 2, 4, 8, 16, 32)
"""Rows of a step: the first number that the texts do not exceed."""


class NoPlaceError(RuntimeError):
    """Every place has a text."""


class _Kind(NamedTuple):
    """What a choice takes into account: tokens that are suppressed, filters, chance."""

    suppressed: bool
    filtered: bool
    drawn: bool


class Text:
    """A text among several.

    Attributes:
        length: tokens so far, of prompt and answer.
        stop_reason: why it ended: "stop" (a stop token), "length" (its limit) or "left"; None before it ends.
    """

    def __init__(self, place: int, length: int, limit: int, stop: frozenset[int], kind: _Kind) -> None:
        self.length = length
        self.stop_reason: Literal["stop", "length", "left"] | None = None
        self._place, self._last, self._stop, self._kind = place, length + limit, stop, kind
        self._started = length + 1  # its length after the steps that have been started


class Texts:
    """Texts that a model continues at once.

    Attributes:
        capacity: the most tokens of a text, of prompt and answer together.
        places: the most texts at once.
        here: the texts that go on.

    Args:
        model: a model from `load_model`, whole and without gated delta nets.
        capacity: 1 or more.
        places: 1 to 32; each takes memory for `capacity` tokens.
        chunk: the most tokens of a prompt in one pass.
        cache_type: "int8" for keys and values of 8 bits, see `cache_codes`.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedModelError: the model does not support several texts at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        capacity: int,
        places: int = 8,
        chunk: int = CHUNK,
        cache_type: CacheType = "model",
    ) -> None:
        if capacity < 1 or chunk < 1 or not 1 <= places <= MOST_TEXTS:
            raise ValueError(
                f"expected capacity and chunk of 1 or more and 1 to {MOST_TEXTS} places; "
                f"found {capacity}, {chunk} and {places}"
            )
        config = model.config.get_text_config(decoder=True)
        self._model, self._chunk, self.capacity, self.places = model, chunk, capacity, places
        self._device = device = model.device
        self._cache = KeyValueCache(config, capacity, device, places, cache_type)
        refused = {
            "divided among ranks": is_divided(model),
            "with states of gated delta nets": LINEAR in self._cache.kinds,
        }
        if what := next((each for each, holds in refused.items() if holds), ""):
            raise UnsupportedModelError(f"a model {what} continues one text at a time", ONE_BY_ONE)
        try:
            with plan_for(rotaries(model), capacity):
                step = step_for(model, self._cache, device, fused=True)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(error.cause, ONE_BY_ONE) from error
        assert step is not None  # noqa: S101 -- else `step_for` raises
        step.allocate()
        self._step = step

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._rows, self._advances, self._ones = zeros(places), zeros(places), zeros(places) + 1
        self._token, self._seed, self._chosen = zeros(places), zeros(places), zeros(places, capacity)
        self._temperature = zeros(places, dtype=torch.float32)
        self._filters = FiltersOfTexts.none(places, device)
        self._never = suppression(model)
        self._suppressed = zeros(places, -(-config.vocab_size // 8) * 8, dtype=torch.bool)
        self._in = list[Text | None]([None] * places)
        self._running, self._posted = list[Text](), deque[list[Text]]()
        self._fresh = list[tuple[Text, int | None]]()
        self._mailbox = (GpuStepsMailbox if device.type == "cuda" else StepsMailbox)(self._token)
        self._recorders = dict[tuple[_Kind, int], Recorder]()  # by slots that are read, too

    @property
    def here(self) -> list[Text]:
        """The texts that go on, or whose last tokens `step` has not returned yet."""
        last = [text for text, _ in self._fresh if text.stop_reason is not None]
        return [*dict.fromkeys(last), *(text for text in self._in if text is not None)]

    @property
    def free(self) -> int:
        """The number of texts that can join."""
        return self._in.count(None)

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes."""
        return self._cache.nbytes

    @torch.no_grad()
    def join(
        self,
        ids: Sequence[int],
        limit: int,
        *,
        stop: Collection[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
        filters: Filters | None = None,
        suppressed: Collection[int] = (),
    ) -> Text:
        """Process the prompt of a text, which takes part in the steps from now on.

        Args:
            ids: the prompt, one token or more, each below the model's vocabulary size.
            limit: the most tokens of the answer, 1 or more.
            stop: tokens that end the answer; such a token is not returned.
            temperature: 0 takes the best token, as does less than 2^-20; up to 2^20, draws follow probabilities.
            seed: seed of the draws, 0 to 2^32 - 1.
            filters: what else decides which tokens are drawn; None for nothing.
            suppressed: tokens that are never chosen, beside those that the model suppresses.

        Raises:
            NoPlaceError: all places are taken.
            CapacityError: prompt and answer would be longer than the capacity.
            ValueError: an argument is out of its range.
            NotFiniteError: the logits are infinite or NaN. The text has not joined, and others are not affected.
        """
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        named = all(0 <= each < vocabulary for each in suppressed) and len(set(suppressed)) < vocabulary
        if limit < 1 or not 0 <= temperature <= LIMIT or not 0 <= seed < 1 << 32 or not named:
            raise ValueError(
                f"expected a limit of 1 or more, a temperature of 0 to 2^20, a seed below 2^32 and suppressed "
                f"tokens of 0 to {vocabulary - 1}, not all; found {limit}, {temperature}, {seed} and "
                f"{list(suppressed)}"
            )
        check_ids(self._model, ids)
        check_room(len(ids) + limit, self.capacity)
        if None not in self._in:
            raise NoPlaceError(f"all {self.places} places are taken: wait until a text ends, or let one leave")
        place, temperature = self._in.index(None), settled(temperature)
        kind = _Kind(
            suppressed=bool(suppressed) or self._never is not None,
            filtered=filters is not None and filters.matter(temperature),
            drawn=temperature > 0,
        )
        text = Text(place, len(ids), limit, frozenset(stop), kind)
        self._seed[place], self._temperature[place] = seed, temperature
        self._filters.put(place, filters if filters is not None and kind.filtered else Filters())
        self._suppressed[place] = False if self._never is None else self._never
        self._suppressed[place, torch.tensor(list(suppressed), dtype=torch.int64, device=self._device)] = True
        logits = self._read(place, ids)
        self._rows[:1] = place
        self._running = []  # as the rows are others now
        TorchOperations().choose_of_texts(logits, None, self._choice(1, kind, self._ones))
        self._in[place] = text
        self._take(text, int(self._token[place]), self._fresh)
        return text

    def leave(self, text: Text) -> None:
        """Take a text out, so that its place is free: nothing more of it is returned. One that ended has left."""
        self._fresh = [pair for pair in self._fresh if pair[0] is not text]
        if text.stop_reason is None:
            self._end(text, "left")

    def step(self) -> list[tuple[Text, int | None]]:
        """Run a step of all texts, and return the next tokens.

        Returns:
            Texts with a token each, in no particular order; a text that ended has a last pair with None. Empty if
            no text is here.
        """
        found, self._fresh = self._fresh, []
        while not found:
            while len(self._mailbox) <= self._mailbox.lag and (running := self._unfinished()):
                self._start(running)
            if not self._mailbox:
                break
            tokens = self._mailbox.read()
            for text in self._posted.popleft():
                if text.stop_reason is None:
                    self._take(text, tokens[text._place], found)
        return found

    def _read(self, place: int, ids: Sequence[int]) -> Tensor:
        """Process a prompt in a place, and return the logits after it, float32 (1, V)."""
        step = self._step.with_cache(self._cache.place(place))
        tokens = torch.tensor(ids, dtype=torch.int64, device=self._device)
        for at in range(0, len(ids), self._chunk):
            part = tokens[at : at + self._chunk]
            logits = step.chunk(part, at, last=at + len(part) == len(ids))
        assert logits is not None  # noqa: S101 -- those of the last chunk
        check_finite(logits, self._model.dtype)
        self._chosen[place, : len(ids)] = tokens
        self._cache.position[place] = len(ids) - 1
        return logits

    def _unfinished(self) -> list[Text]:
        """Return the texts that need more steps than have been started."""
        return [text for text in self._in if text is not None and text._started < text._last]

    def _start(self, running: list[Text]) -> None:
        """Start a step of these texts."""
        if running != self._running:
            self._arrange(running)
        count = min(self.places, next(rows for rows in ROWS if rows >= len(running)))
        kind = _Kind(*map(any, zip(*(text._kind for text in running), strict=True)))
        reach = self._cache.reach(max(text._started for text in running) - 1)
        if (kind, reach) not in self._recorders:
            changing = self._token, self._cache.position
            self._recorders[kind, reach] = Recorder(lambda: changing, several=False)
        self._recorders[kind, reach].form(partial(self._advance, kind, reach), count, 1, nullcontext)()
        for text in running:
            text._started += 1
        self._mailbox.post()
        self._posted.append(running)

    def _arrange(self, running: list[Text]) -> None:
        """Give these texts the first rows; other places come behind them, and do not advance."""
        taken = [text._place for text in running]
        others = [place for place in range(self.places) if place not in taken]
        self._rows.copy_(torch.tensor([*taken, *others]))
        self._advances.copy_(torch.tensor([int(place in taken) for place in range(self.places)]))
        self._cache.position.mul_(self._advances)
        self._running = running

    @torch.no_grad()
    def _advance(self, kind: _Kind, reach: int, rows: int) -> None:
        """Run one step of so many rows that reads the first slots of the cache, up to `reach`. This is recorded."""
        self._step.advance_texts(self._choice(rows, kind, self._advances), reach)

    def _choice(self, rows: int, kind: _Kind, advances: Tensor) -> TextsChoice:
        return TextsChoice(
            places=self._rows[:rows],
            advances=advances,
            position=self._cache.position,
            token=self._token,
            chosen=self._chosen,
            seed=self._seed,
            temperature=self._temperature if kind.drawn else None,
            suppressed=self._suppressed if kind.suppressed else None,
            filters=self._filters if kind.filtered else None,
        )

    def _take(self, text: Text, token: int, found: list[tuple[Text, int | None]]) -> None:
        """Take a token of a text, which may end it."""
        text.length += 1
        if token in text._stop:
            self._end(text, "stop")
        else:
            found.append((text, token))
            if text.length == text._last:
                self._end(text, "length")
        if text.stop_reason is not None:
            found.append((text, None))

    def _end(self, text: Text, reason: Literal["stop", "length", "left"]) -> None:
        text.stop_reason = reason
        self._in[text._place] = None
