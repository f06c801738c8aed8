"""Generating tokens with a transformers model: prefill in chunks, then decode without waiting for the device.

    generator = Generator(model, capacity=2048)
    generator.prefill(ids)
    for token in generator.generate(128, stop={2}): ...

A decoding step runs entirely on the device: embedding, layers, head and the choice of the token, which is the input
of the next step. On a GPU the step is recorded as a CUDA graph and replayed (`recording`). The host reads tokens a
few steps late, from pinned memory, and never makes the device wait. So it sees a stop token a few steps late, and
drops the tokens of those steps.

The step is our own (`step`), with one graph for any length of the text, or the forward pass of transformers' model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from q6k_kernels.generate.attention import implementation, lent
from q6k_kernels.generate.cache_codes import CacheType
from q6k_kernels.generate.checking import check_finite, check_ids, check_room
from q6k_kernels.generate.filters import LIMIT, Filters
from q6k_kernels.generate.kv_cache import KeyValueCache, cache_argument
from q6k_kernels.generate.likelihoods import Likelihoods
from q6k_kernels.generate.mailbox import GpuMailbox, Mailbox
from q6k_kernels.generate.recording import Recorder, bucket
from q6k_kernels.generate.sampling import settled, suppression
from q6k_kernels.generate.step_reference import TokenChoice, TorchOperations
from q6k_kernels.generate.stepping import step_for
from q6k_kernels.models.cache_layout import CHUNK
from q6k_kernels.models.ranks import is_divided
from q6k_kernels.models.rotary import plan_for, rotaries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAIL = 16
"""Tokens at the end of a text that the next one may lack: templates end with the beginning of an answer, which a
later turn may write in another way."""


def _changing(token: Tensor, cache: KeyValueCache) -> tuple[Tensor, ...]:
    """Return the tensors that a step reads and changes."""
    return token, cache.position, *cache.states.tensors


class Generator:
    """A text that a model continues.

    Attributes:
        capacity: positions in the cache, the most tokens of prompt and answer together.
        length: tokens so far, of prompt and answer.
        stop_reason: why the last `generate` ended: "stop" (a stop token) or "length"; None before it ends.
        cache: the cache of keys and values.
        fused: whether decoding steps are our own.
        likelihoods: how likely the model finds the tokens that it chose, if they are noted.
        reused: tokens of the last prompt that were in the cache already, see `resume`.

    Args:
        model: a causal language model of transformers, in eval mode, on one device (divided among ranks: on each).
        capacity: 1 or more.
        temperature: 0 takes the best token, as does less than 2^-20; up to 2^20, draws follow probabilities.
        seed: seed of the draws, 0 to 2^32 - 1; the same seed gives the same tokens.
        filters: what else decides which tokens are drawn; None for nothing.
        logprobs: of so many likeliest tokens, and of the chosen one, note how likely they are; None: of none.
        fused: whether decoding steps are our own, see `step`, or the forward pass of transformers' model. They are
            our own by default on a GPU, for whole models from `load_model` with kernels for their dtype and sizes.
        chunk: the most tokens of a prompt in one forward pass.
        cache_type: "int8" for keys and values of 8 bits, see `cache_codes`, with steps of our own.
        persistent: decode by one kernel that runs a whole step, see `persist_cuda`: for dense models on Hopper.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedModelError: the cache, or with `fused` our step, does not support a layer of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        capacity: int,
        temperature: float = 0.0,
        seed: int = 0,
        filters: Filters | None = None,
        logprobs: int | None = None,
        fused: bool | None = None,
        chunk: int = CHUNK,
        cache_type: CacheType = "model",
        persistent: bool = False,
    ) -> None:
        if capacity < 1 or chunk < 1 or not 0 <= temperature <= LIMIT or not 0 <= seed < 1 << 32:
            raise ValueError(
                f"expected capacity and chunk of 1 or more, a temperature of 0 to 2^20 and a seed below 2^32; "
                f"found {capacity}, {chunk}, {temperature} and {seed}"
            )
        temperature = settled(temperature)
        self.device, self._on_gpu = model.device, model.device.type == "cuda"
        config = model.config.get_text_config(decoder=True)
        self.cache = KeyValueCache(config, capacity, self.device, cache_type=cache_type)
        self._rotaries = rotaries(model)
        with plan_for(self._rotaries, capacity):
            self._fused_step = step_for(model, self.cache, self.device, fused, persistent=persistent)
        self.fused = self._fused_step is not None
        self._attention = implementation("plain")
        self._model, self._cache_argument = model, cache_argument(model)
        self._chunk, self.capacity = chunk, capacity
        self.length = self.reused = 0
        self.stop_reason: Literal["stop", "length"] | None = None
        self._token = torch.zeros(1, dtype=torch.int64, device=self.device)
        # All tokens by position; one more than the cache has, as the last token is never an input.
        self._chosen = torch.zeros(capacity + 1, dtype=torch.int64, device=self.device)
        self.likelihoods: Likelihoods | None = None
        if logprobs is not None:
            self.likelihoods = Likelihoods(capacity + 1, min(logprobs, config.vocab_size), self.device)
        self._choice = TokenChoice(
            position=self.cache.position,
            token=self._token,
            chosen=self._chosen,
            seed=torch.tensor([seed], dtype=torch.int64, device=self.device),
            temperature=temperature,
            suppressed=suppression(model),
            filters=filters if filters is not None and filters.matter(temperature) else None,
            likelihoods=self.likelihoods,
        )
        several = self.fused and not is_divided(model)  # ranks could differ in how many
        self._recorder = Recorder(partial(_changing, self._token, self.cache), several=several)
        # The last token of an answer: not in the cache yet, so the next prefill begins with it.
        self._unseen: list[int] = []
        self._ready = False

    def reset(self) -> None:
        """Forget the text; keep the memory of the cache and the recorded steps."""
        self.cache.forget()
        self.length, self.reused, self._unseen, self._ready, self.stop_reason = 0, 0, [], False, None

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Process the next tokens of the text, and choose the token after them.

        Args:
            ids: one or more, each below the model's vocabulary size.

        Returns:
            Logits of the token after them, float32 (V,), on the device.

        Raises:
            CapacityError: the text would be longer than the capacity.
            ValueError: no ids, or one outside the vocabulary.
            NotFiniteError: the logits are infinite or NaN.
        """
        check_ids(self._model, ids)
        self.reused = self.length - len(self._unseen)
        return self._read(self.reused, [*self._unseen, *ids], lasting=False)

    def resume(self, ids: Sequence[int]) -> Tensor:
        """Make these tokens the whole text, and choose the token after them; arguments and errors as of `prefill`.

        What they begin with like the text so far stays in the cache and is not processed again, where layers with
        windows or states can still go back to it.
        """
        check_ids(self._model, ids)
        before = self._chosen[: self.length - len(self._unseen)].tolist()
        # The last token has to run, for its logits.
        self.reused = sum(1 for _ in takewhile(bool, map(eq, before, ids[:-1])))
        if not self.cache.holds_before(self.reused):
            self.reused = 0
        return self._read(self.reused, list(ids[self.reused :]), lasting=True)

    @torch.no_grad()
    def _read(self, start: int, ids: list[int], *, lasting: bool) -> Tensor:
        """Process tokens from a position on, see `prefill`; if `lasting`, a later text can go back near the end."""
        check_room(start + len(ids), self.capacity)
        begin = self.cache.states.rewind(start)
        self.reused = min(self.reused, begin)
        ids = [*self._chosen[begin:start].tolist(), *ids] if begin < start else ids
        self.cache.states.save(begin)
        on_device = torch.tensor(ids, dtype=torch.int64, device=self.device)
        self._chosen[begin : begin + len(ids)] = on_device
        early = max(0, len(ids) - TAIL) if lasting and self.cache.states.layers else 0
        logits: Tensor | None = None
        for at in sorted({*range(0, early, self._chunk), *range(early, len(ids), self._chunk)}):
            part = on_device[at : min(at + self._chunk, early if at < early else len(ids))]
            if at and at == early:
                self.cache.states.save(begin + at, lasting=True)
            self.cache.started(begin + at + len(part))
            logits = self._chunk_of(part, begin + at, last=at + len(part) == len(ids))
        assert logits is not None  # noqa: S101 -- those of the last chunk
        check_finite(logits, self._model.dtype)
        self.length, self._unseen, self._ready, self.stop_reason = begin + len(ids), [], True, None
        self.cache.position.fill_(self.length - 1)
        self._choose(logits)
        return logits[0]

    def _chunk_of(self, tokens: Tensor, start: int, *, last: bool) -> Tensor | None:
        """Process a chunk of the prompt, int64 (M,); return the logits after the last one, float32 (1, V)."""
        if self._fused_step is not None:
            return self._fused_step.chunk(tokens, start, last=last)
        masks = self.cache.begin_chunk(start, len(tokens))
        positions = torch.arange(start, start + len(tokens), device=self.device)
        with self._our_attention():
            return self._forward(tokens[None], masks, positions[None])

    def prepare(self, tokens: int | None = None) -> None:
        """Record in advance the steps that `generate` needs for that many tokens.

        Args:
            tokens: the most tokens to generate; None: as many as there is room for, so that no later answer in this
                cache records anything. It costs little: our own steps are of two kinds, see `KeyValueCache.reach`.

        Raises:
            CapacityError, RuntimeError: see `generate`.
        """
        if tokens is None and self.length == self.capacity:
            return
        tokens = self.capacity - self.length if tokens is None else tokens
        self._check_decode(tokens)
        end = self.length + tokens - 1
        for at in self._one_of_each_bucket(self.length, end):
            self._steps(at)
        together = self._recorder.together
        # `_generate` runs several at once behind as many tokens.
        for last in self._one_of_each_bucket(self.length + 2 * together - 2, end):
            self._steps(last - together + 1, together)

    def generate(self, tokens: int, stop: Collection[int] = ()) -> Iterator[int]:
        """Generate the answer, token by token.

        Args:
            tokens: the most tokens to generate, 1 or more.
            stop: ids that end the answer; such a token is not returned, but belongs to the text.

        Raises:
            CapacityError: the text would be longer than the capacity.
            RuntimeError: no `prefill` since the last answer.
        """
        self._check_decode(tokens)
        self._ready = False
        return self._generate(tokens, stop)

    def _generate(self, tokens: int, stop: Collection[int]) -> Iterator[int]:
        start = self.length
        mailbox = GpuMailbox(self._chosen) if self._on_gpu else Mailbox(self._chosen)
        mailbox.post(start)
        posted, read = 1, 0
        try:
            while read < tokens:
                while posted < tokens and (ahead := posted - read) <= mailbox.lag:
                    # Several steps at once are started only behind as many running ones, whose tokens are read
                    # meanwhile. So the device never waits for the host, and an answer begins token by token.
                    together = self._recorder.together
                    count = together if together <= min(ahead, tokens - posted) else 1
                    position = start + posted - 1
                    run = self._steps(position, count)
                    self.cache.states.save(position)
                    self.cache.started(position + count)
                    run()
                    mailbox.post(start + posted, count)
                    posted += count
                token = mailbox.read()
                read += 1
                self.length, self._unseen = start + read, [token]
                if token in stop:
                    self.stop_reason = "stop"
                    return
                if read == tokens:
                    self.stop_reason = "length"
                yield token
        finally:
            mailbox.close()

    @torch.no_grad()
    def step(self, keys: int) -> None:
        """Run one decoding step: the last token through the model, then the choice of the next. This is recorded.

        Args:
            keys: slots of the cache that the step reads, more than its position.
        """
        if self._fused_step is not None:
            self._fused_step.advance(self._choice, keys)
            return
        masks = self.cache.begin_step(keys)
        # The cache's position is the slot that the step writes.
        logits = self._forward(self._token[None], masks, self.cache.position[None])
        self._choose(logits)

    def _forward(self, ids: Tensor, masks: object, positions: Tensor) -> Tensor:
        """Return the logits after the last token, float32 (1, V)."""
        out = self._model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self.cache},
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _choose(self, logits: Tensor) -> None:
        """Choose the token after the cache's position, and advance the position to it."""
        TorchOperations().choose(logits, None, self._choice)

    def _bucket(self, position: int) -> int:
        """Return the number of slots that a step at this position reads."""
        if self.fused:
            return self.cache.reach(position)
        return bucket(position, self.capacity, self.cache.slots)

    def _one_of_each_bucket(self, position: int, end: int) -> Iterator[int]:
        """Return the first positions before `end`, from one on, whose steps read as many slots."""
        while position < end:
            yield position
            position = self._bucket(position)

    def _steps(self, position: int, count: int = 1) -> Callable[[], object]:
        """Return a function that runs `count` steps, the first at this position."""
        keys = self._bucket(position + count - 1)
        if count > 1:
            self._recorder.form(self.step, keys, 1, self._our_attention)
        return self._recorder.form(self.step, keys, count, self._our_attention)

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        """Give the model our attention inside the context only, since it belongs to the caller."""
        with lent(self._model, self._attention), plan_for(self._rotaries, self.capacity):
            yield

    def _check_decode(self, tokens: int) -> None:
        if not self._ready:
            raise RuntimeError("no prompt to answer: call `prefill` first")
        if tokens < 1:
            raise ValueError(f"tokens: expected 1 or more, found {tokens}")
        check_room(self.length + tokens, self.capacity)
