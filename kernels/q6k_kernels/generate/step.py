"""A pass through a whole model in few launches: products, and between them norms, attention and gates.

    step = Step(model, cache, operations, of_chunks)
    logits = step.chunk(tokens, start, last=True)
    step.advance(choice)

transformers' modules hold the weights (`step_layers`). Their computation is written here again, once for one token
and for many: a decoding step and a chunk of a prompt are the same list of operations, with kernels of their own.
Residual sum, norm and quantisation are one launch; rotation, cache and attention are another. In a step the length
of the text is only a number on the device, so one CUDA graph serves every length.
"""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from q6k_kernels.errors import BlocksNotResidentError, UnsupportedModelError
from q6k_kernels.generate.balancing import balanced
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached, Norm
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.mixture import Mixed
from q6k_kernels.generate.operations import StepOperations
from q6k_kernels.generate.step_layers import Layers, Projections, StepLayer
from q6k_kernels.generate.step_reference import ProductInput, TokenChoice, capped
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.models.architecture import SLIDING, attached
from q6k_kernels.models.ranks import joined, no_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from q6k_kernels.generate.persist_cuda import PersistentStep


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
    ) -> None:
        architecture = attached(model)
        if architecture is None:
            raise _unsupported(f"a {type(model).__name__} that load_model has not made")
        if reason := no_step(model):
            raise _unsupported(reason)
        config: Any = model.config
        self._architecture, self._cache, self._dtype = architecture, cache, model.dtype
        self._operations, self._of_chunks = operations, of_chunks or operations
        self._of_texts = of_texts or operations
        self._whole = whole
        inner: Any = model.model
        self._inner = inner
        make = Layers(architecture, config, inner, cache)
        self._embedding: nn.Module = model.get_input_embeddings()
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._softcap = architecture.softcap_of_logits(config)
        multipliers = architecture.multipliers
        self._of_embedding = config.embedding_multiplier if multipliers else 1.0
        self._of_summands = config.residual_multiplier if multipliers else 1.0
        # A factor of the logits may as well be one of the head's input.
        self._norm = make.norm(inner.norm, architecture.factor_of_logits(config))
        layers = [make.layer(*each) for each in zip(inner.layers, cache.kinds, strict=True)]
        self._layers = layers if cache.cache_type == "model" else balanced(layers, cache.source)
        self._last_stored = max(cache.source)
        """The last layer that writes to the cache."""
        for layer in self._layers:
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
        for index, layer in enumerate(self._layers):
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
        if last or every:
            return capped(self._logits(given, every=every), self._softcap)
        self._hidden(given, self._embedded(given), stored_only=True)
        return None

    @torch.no_grad()
    def _logits(self, given: _Pass, *, every: bool = False) -> Tensor:
        hidden = self._embedded(given)
        if self._whole is None or given.start is not None or given.places is not None:
            return self._multiply(given, self._head, self._hidden(given, hidden, every=every))

        def through_the_model(run: StepOperations) -> Tensor:
            noted = replace(given, run=run)
            return self._multiply(noted, self._head, self._hidden(noted, hidden))

        try:
            return self._whole(hidden, given.position, through_the_model)
        except BlocksNotResidentError as error:
            warnings.warn(f"{error.cause}; from now on each operation is a launch. {error.remedy}", stacklevel=2)
            self._whole = None
            return through_the_model(given.run)

    def _embedded(self, given: _Pass) -> Tensor:
        hidden: Tensor = self._embedding(given.tokens)
        return hidden if self._of_embedding == 1.0 else hidden * self._of_embedding

    @torch.no_grad()
    def _hidden(
        self, given: _Pass, hidden: Tensor, *, stored_only: bool = False, every: bool = False
    ) -> ProductInput:
        """Return what the head multiplies, of the last token or all; `stored_only` ends once all is stored."""
        delta: Tensor | Mixed | None = None
        after: Norm | None = None
        scale = 1.0
        of_layers = self._embeddings_of_layers(given.tokens, hidden)
        for index, layer in enumerate(self._layers):
            run, users = given.run, layer.of_network
            beside, behind = (users, []) if layer.parallel else ([], users)
            seeing = [*layer.inputs.modules, *beside]
            hidden, first = self._add_norm(given, hidden, delta, after, layer.norm, seeing, scale)
            x = self._mixed(given, index, layer, self._project(given, layer.inputs, first))
            if index == self._last_stored and given.start is not None and not every:
                if stored_only:
                    return x
                # No token will see the others again, only what is stored of them.
                given, hidden, first, x = given.end, hidden[-1:], first.end, x.end
                of_layers = [each[-1:] for each in of_layers]
            delta, after = self._multiply(given, layer.output, x), layer.after_attention
            between, further = layer.norm_between, layer.norms_of_mixture
            hidden, second = self._add_norm(given, hidden, delta, after, between, behind, further=further)
            delta = self._network(given, layer, first if layer.parallel else second)
            after, scale = layer.after, layer.scale
            if (end := layer.by_token) is not None:
                hidden, x = self._add_norm(given, hidden, delta, after, None, [end.gate])
                x = run.gate(
                    run.multiply(end.gate, x), of_layers[index], self._architecture.activation, [end.output]
                )
                delta, after = run.multiply(end.output, x), end.after
        return self._add_norm(given, hidden, delta, after, self._norm, [self._head], scale)[1]

    def _network(self, given: _Pass, layer: StepLayer, x: ProductInput) -> Tensor | Mixed:
        """Compute a layer's network, its mixture of experts, or both."""
        mixture = layer.mixture
        if mixture is None:
            return self._dense(given, layer, x)
        of_router, of_experts = (x.halves, x.halves) if mixture.norms is None else x.further
        assert of_router is not None  # noqa: S101 -- the experts are among the users of `x`
        assert of_experts is not None  # noqa: S101 -- as above
        # First, so that it is known which weights the experts need before they are multiplied.
        chosen, factors = given.run.route(of_router, mixture)
        if mixture.spread is not None:
            chosen, own = mixture.spread.here(chosen, factors[:, : mixture.top])
            factors = torch.cat([own, factors[:, mixture.top :]], 1)
        beside = None if layer.down is None else self._dense(given, layer, x)
        mixed = given.run.mix(of_experts, mixture, chosen, factors, beside)
        return mixed if mixture.spread is None else mixed.over_ranks()

    def _dense(self, given: _Pass, layer: StepLayer, x: ProductInput) -> Tensor:
        assert layer.down is not None  # noqa: S101 -- only a layer with a mixture may have no network
        gate, *up = self._project(given, layer.gate_up, x)
        gated = given.run.gate(gate, up[0] if up else None, self._architecture.activation, [layer.down])
        return self._multiply(given, layer.down, gated)

    def _multiply(self, given: _Pass, module: nn.Module, x: ProductInput) -> Tensor:
        """Multiply with a matrix that may be divided among ranks."""
        return joined(module, given.run.multiply(module, x))

    def _add_norm(
        self,
        given: _Pass,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]:
        return given.run.add_norm(hidden, delta, after, norm, users, self._of_summands, scale, further)

    def _embeddings_of_layers(self, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
        """Return each layer's embeddings of the tokens, (M, size), if layers have them."""
        if all(layer.by_token is None for layer in self._layers):
            return []
        inner, embedded = self._inner, hidden[None]
        # transformers 5.17 wants both arguments, and needs one.
        found: Tensor = inner.project_per_layer_inputs(embedded, inner.get_per_layer_inputs(tokens[None], embedded))
        return list(found[0].transpose(0, 1))

    def _mixed(self, given: _Pass, index: int, layer: StepLayer, products: tuple[Tensor, ...]) -> ProductInput:
        """Mix tokens with those before them: by attention to their keys, or by a state."""
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

    def _project(self, given: _Pass, projections: Projections, x: ProductInput) -> tuple[Tensor, ...]:
        found, widths = list[Tensor](), list(projections.widths)
        for module in projections.modules:
            product = self._multiply(given, module, x)
            at = 0
            while at < product.shape[1]:
                width = widths.pop(0)
                found.append(product[:, at : at + width])
                at += width
        return tuple(found)


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"no fused decoding step for {what}", "Generate with fused=False.")
