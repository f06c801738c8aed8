"""A pass through a whole model in few launches: products, and between them norms, attention and gates.

    step = Step(model, cache, operations, of_chunks)
    logits = step.chunk(tokens, start, last=True)
    step.advance(choice)

transformers' modules hold the weights (`step_layers`). Their computation is written again, once for one token and
for many: here for what mixes tokens, in `step_model` for the rest. A decoding step and a chunk of a prompt are the
same list of operations, with kernels of their own. Residual sum, norm and quantisation are one launch; rotation,
cache and attention are another. In a step the length of the text is only a number on the device, so one CUDA graph
serves every length.
"""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from q6k_kernels.errors import BlocksNotResidentError, UnsupportedModelError
from q6k_kernels.generate.balancing import balanced
from q6k_kernels.generate.chunk_recording import ChunkRecorder, RecordedCourse
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.operations import StepOperations
from q6k_kernels.generate.step_layers import Layers
from q6k_kernels.generate.step_model import Course, StepModel
from q6k_kernels.generate.step_reference import ProductInput, TokenChoice, capped
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.models.architecture import SLIDING, attached
from q6k_kernels.models.ranks import joined, no_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from q6k_kernels.generate.persist_cuda import PersistentStep

LAST = slice(-1, None)
"""The last token of a chunk."""


@dataclass(frozen=True)
class _Pass:
    """What one pass processes.

    Attributes:
        run: its operations.
        tokens: int64 (M,).
        position: positions of the tokens, int64 (M,), or with `places` of the last tokens of all, (P,).
        start: position of the first token of a chunk; None in a step.
        places: places of the tokens' texts in a step of several, int64 (M,); else None.
        reach: see `Cached`.
    """

    run: StepOperations
    tokens: Tensor
    position: Tensor
    start: int | None = None
    places: Tensor | None = None
    reach: int | None = None

    @property
    def end(self) -> _Pass:
        """The pass of the last token alone."""
        start = None if self.start is None else self.start + len(self.tokens) - 1
        return _Pass(self.run, self.tokens[-1:], self.position[-1:], start)


class Step:
    """The decoding step of a model, and its chunks of prompts.

    Args:
        model: a model from `load_model`.
        cache: the model's cache. A chunk makes its buffers, so run a prompt before a step.
        operations: the operations of a step.
        of_chunks: those of a chunk, by default the same.
        of_texts: those of a step of several texts, by default those of a step.
        whole: a step of one text as a single launch; None: each operation is one.
        recorder: records what chunks compute between mixings; None: they are launched one by one.

    Raises:
        UnsupportedModelError: the model is not from `load_model`, or the operations do not support its sizes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KeyValueCache,
        operations: StepOperations,
        of_chunks: StepOperations | None = None,
        of_texts: StepOperations | None = None,
        whole: PersistentStep | None = None,
        recorder: ChunkRecorder | None = None,
    ) -> None:
        architecture = attached(model)
        if architecture is None:
            raise _unsupported(f"a {type(model).__name__} that load_model has not made")
        if reason := no_step(model):
            raise _unsupported(reason)
        config: Any = model.config
        self._cache, self._dtype = cache, model.dtype
        self._operations, self._of_chunks = operations, of_chunks or operations
        self._of_texts = of_texts or operations
        self._whole, self._recorder = whole, recorder
        inner: Any = model.model
        make = Layers(architecture, config, inner, cache)
        self._softcap = architecture.softcap_of_logits(config)
        layers = [make.layer(*each) for each in zip(inner.layers, cache.kinds, strict=True)]
        self._model = StepModel(
            inner=inner,
            embedding=model.get_input_embeddings(),
            layers=layers if cache.cache_type == "model" else balanced(layers, cache.source),
            # A factor of the logits may as well be one of the head's input.
            norm=make.norm(inner.norm, architecture.factor_of_logits(config)),
            head=model.get_output_embeddings(),  # type: ignore[no-untyped-call]
            activation=architecture.activation,
            of_embedding=config.embedding_multiplier if architecture.multipliers else 1.0,
            of_summands=config.residual_multiplier if architecture.multipliers else 1.0,
        )
        self._stored = max(cache.source) + 1
        """The number of layers up to the last one that writes to the cache."""
        for layer in self._model.layers:
            if reason := operations.supports(config.hidden_size, layer.between, layer.heads):
                raise _unsupported(reason)
            if layer.mixture is not None and (reason := operations.supports_mixture(layer.mixture)):
                raise _unsupported(reason)
            operations.reserve(layer.heads)

    def advance(self, choice: TokenChoice, reach: int | None = None) -> None:
        """Run one step: the last token through the model, then the choice of the next.

        Args:
            choice: where to find the last token and put the next; its position must be the cache's tensor.
            reach: slots of the cache that it reads at most; None: all.
        """
        logits = self._logits(_Pass(self._operations, choice.token, self._cache.position, reach=reach))
        self._operations.choose(logits, self._softcap, choice)

    def advance_texts(self, choice: TextsChoice, reach: int | None = None) -> None:
        """Run one step of several texts, see `advance`: their last tokens through the model, then the choice."""
        places = choice.places
        run = self._operations if len(places) == 1 else self._of_texts
        given = _Pass(run, choice.token[places], choice.position, places=places, reach=reach)
        run.choose_of_texts(self._logits(given), self._softcap, choice)

    def allocate(self) -> None:
        """Allocate the cache's buffers, before the first prompt."""
        for index, layer in enumerate(self._model.layers):
            if not isinstance(layer.heads, DeltaHeads):
                self._cache.allocate(index, layer.heads.key_heads, layer.heads.dim, self._dtype)

    def with_cache(self, cache: KeyValueCache) -> Self:
        """Return the same step with the cache of one place, see `KeyValueCache.place`."""
        other = copy(self)
        other._cache = cache
        return other

    def __call__(self, token: Tensor) -> Tensor:
        """Return the logits, float32 (1, V), that follow a token, int64 (1,), at the cache's position."""
        return capped(self._logits(_Pass(self._operations, token, self._cache.position)), self._softcap)

    @torch.no_grad()
    def chunk(self, tokens: Tensor, start: int, *, last: bool, every: bool = False) -> Tensor | None:
        """Process a chunk of a prompt.

        Args:
            tokens: int64 (M,).
            start: position of the first of them.
            last: whether no more chunks follow.
            every: whether the logits after each token are wanted.

        Returns:
            Logits, float32 (1, V), that follow the last token, of the last chunk; with `every` (M, V) of any chunk.
        """
        states = self._cache.states
        states.allocate(self._dtype)
        if not start:
            states.clear()
        position = torch.arange(start, start + len(tokens), device=tokens.device)
        given = _Pass(self._of_chunks, tokens, position, start)
        if every:
            return capped(self._logits(given), self._softcap)
        course: Course | RecordedCourse | None = None
        if self._recorder is not None:
            course = self._recorder.course(self._model, tokens, self._stored)
        if course is None:
            course = Course.begin(self._model, given.run, tokens)
        mixed = self._through(given, course, None, 0, self._stored)
        if not last:
            return None
        # No token will see the others again, only what is stored of them.
        end = course.part(LAST, given.run)
        return capped(self._after(given.end, end, mixed.part(LAST)), self._softcap)

    @torch.no_grad()
    def _logits(self, given: _Pass) -> Tensor:
        """Return the logits after each token, without a cap."""
        hidden = self._model.embedded(given.tokens)

        def through_the_model(run: StepOperations) -> Tensor:
            noted = replace(given, run=run)
            course = Course.begin(self._model, run, given.tokens, hidden)
            return self._after(noted, course, self._through(noted, course, None, 0, self._stored))

        if self._whole is None or given.start is not None or given.places is not None:
            return through_the_model(given.run)
        try:
            return self._whole(hidden, given.position, through_the_model)
        except BlocksNotResidentError as error:
            warnings.warn(f"{error.cause}; from now on each operation is a launch. {error.remedy}", stacklevel=2)
            self._whole = None
            return through_the_model(given.run)

    def _after(self, given: _Pass, course: Course, mixed: ProductInput) -> Tensor:
        """Return the logits of tokens behind the last layer that stores anything, without a cap."""
        mixed = self._through(given, course, mixed, self._stored, len(self._model.layers))
        return joined(self._model.head, given.run.multiply(self._model.head, course.finish(mixed)))

    def _through(
        self, given: _Pass, course: Course | RecordedCourse, mixed: ProductInput | None, begin: int, end: int
    ) -> ProductInput:
        """Take tokens from the result of the mixing in the layer before `begin` to that in the one before `end`."""
        for index in range(begin, end):
            mixed = self._mixed(given, index, course.advance(mixed))
        assert mixed is not None  # noqa: S101 -- the first layer at least stores
        return mixed

    def _mixed(self, given: _Pass, index: int, products: tuple[Tensor, ...]) -> ProductInput:
        """Mix tokens with those before them: by attention to their keys, or by a state."""
        layer = self._model.layers[index]
        heads, users = layer.heads, [layer.output]
        if isinstance(heads, DeltaHeads):
            mixed, z, b, a = products
            return given.run.delta(mixed, z, b, a, heads, self._cache.states.of(index), users)
        q, *key_and_value = products
        # Without a projection of their own, values are keys; without any, both are those of an earlier layer.
        k, v = (key_and_value[0], key_and_value[-1]) if key_and_value else (None, None)
        if given.start is not None:
            self._cache.allocate(index, heads.key_heads, heads.dim, self._dtype)
        both, scales = self._cache.buffers(index), self._cache.scales(index)
        window = self._cache.window if self._cache.kinds[index] == SLIDING else 0
        cached = Cached(*both, window, given.start, given.places, scales, given.reach)
        return given.run.attend(q, k, v, heads, cached, given.position, users)


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"no fused decoding step for {what}", "Generate with fused=False.")
