"""A model as passes see it, and the way of tokens through its layers: all that is computed of each token alone.

    course = Course.begin(model, run, tokens)
    mixed = mix(course.advance())            # of the first layer
    mixed = mix(course.advance(mixed))       # of each other one
    x = course.finish(mixed)

Only mixing, by attention or a state, knows of other tokens, of positions and of the cache. It is left to the
caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.mixture import Mixed
from q6k_kernels.generate.operations import StepOperations
from q6k_kernels.generate.step_layers import Projections, StepLayer
from q6k_kernels.generate.step_reference import ProductInput
from q6k_kernels.models.layer import Activation
from q6k_kernels.models.ranks import joined


@dataclass
class StepModel:
    """A model as a pass sees it.

    Attributes:
        inner: transformers' model without its head.
        embedding: the embedding of tokens.
        layers: the layers.
        norm: the norm of what the head multiplies, with a factor of the logits.
        head: the head.
        activation: the activation function of networks.
        of_embedding: factor of the embedding.
        of_summands: factor of what layers add to the residual stream.
    """

    inner: Any
    embedding: nn.Module
    layers: list[StepLayer]
    norm: Norm
    head: nn.Module
    activation: Activation
    of_embedding: float
    of_summands: float

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return the embeddings, (M, K), of tokens, int64 (M,)."""
        hidden: Tensor = self.embedding(tokens)
        return hidden if self.of_embedding == 1.0 else hidden * self.of_embedding

    def embeddings_of_layers(self, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
        """Return each layer's embeddings of the tokens, (M, size), if layers have them."""
        if all(layer.by_token is None for layer in self.layers):
            return []
        inner, embedded = self.inner, hidden[None]
        # transformers 5.17 wants both arguments, and needs one.
        found: Tensor = inner.project_per_layer_inputs(embedded, inner.get_per_layer_inputs(tokens[None], embedded))
        return list(found[0].transpose(0, 1))


@dataclass
class Course:
    """Tokens on their way through the layers.

    Attributes:
        model: the model.
        run: the operations.
        hidden: the residual stream, (M, K).
        of_layers: each layer's embeddings of the tokens, if layers have them.
        index: the layer that they have reached; -1 before the first.
        first: what the projections of that layer have multiplied.
        delta: what is still to be added to the residual stream, or None.
        after: the norm of `delta`, or None.
        scale: factor of the sum.
    """

    model: StepModel
    run: StepOperations
    hidden: Tensor
    of_layers: list[Tensor]
    index: int = -1
    first: ProductInput | None = None
    delta: Tensor | Mixed | None = None
    after: Norm | None = None
    scale: float = 1.0

    @classmethod
    def begin(cls, model: StepModel, run: StepOperations, tokens: Tensor, hidden: Tensor | None = None) -> Course:
        """Return tokens, int64 (M,), before the first layer; `hidden` are their embeddings, if they are known."""
        hidden = model.embedded(tokens) if hidden is None else hidden
        return cls(model, run, hidden, model.embeddings_of_layers(tokens, hidden))

    def advance(self, mixed: ProductInput | None = None) -> tuple[Tensor, ...]:
        """Go on to the next layer, with the result of the mixing in this one; return the input of mixing there."""
        if mixed is not None:
            self._leave(mixed)
        self.index += 1
        layer = self.model.layers[self.index]
        seeing = [*layer.inputs.modules, *(layer.of_network if layer.parallel else [])]
        self.first = self._add_norm(layer.norm, seeing, self.scale)
        return self._project(layer.inputs, self.first)

    def finish(self, mixed: ProductInput) -> ProductInput:
        """Return what the head multiplies, with the result of the mixing in the last layer."""
        self._leave(mixed)
        return self._add_norm(self.model.norm, [self.model.head], self.scale)

    def part(self, rows: slice, run: StepOperations) -> Course:
        """Return some of the tokens where these are after `advance`, with operations of their own."""
        return replace(self.changed(lambda each: each[rows]), run=run)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Course:
        """Return the same after `advance` with each tensor changed."""
        first = None if self.first is None else self.first.changed(change)
        of_layers = list(map(change, self.of_layers))
        return replace(self, hidden=change(self.hidden), of_layers=of_layers, first=first)

    def _leave(self, mixed: ProductInput) -> None:
        """Compute the rest of a layer."""
        layer, run, activation = self.model.layers[self.index], self.run, self.model.activation
        self.delta, self.after = self._multiply(layer.output, mixed), layer.after_attention
        behind = [] if layer.parallel else layer.of_network
        second = self._add_norm(layer.norm_between, behind, further=layer.norms_of_mixture)
        x = self.first if layer.parallel else second
        assert x is not None  # noqa: S101 -- `advance` came before
        self.delta, self.after, self.scale = self._network(layer, x), layer.after, layer.scale
        if (end := layer.by_token) is not None:
            x = self._add_norm(None, [end.gate])
            x = run.gate(run.multiply(end.gate, x), self.of_layers[self.index], activation, [end.output])
            self.delta, self.after = run.multiply(end.output, x), end.after

    def _network(self, layer: StepLayer, x: ProductInput) -> Tensor | Mixed:
        """Compute a layer's network, its mixture of experts, or both."""
        mixture = layer.mixture
        if mixture is None:
            return self._dense(layer, x)
        of_router, of_experts = (x.halves, x.halves) if mixture.norms is None else x.further
        assert of_router is not None  # noqa: S101 -- the experts are among the users of `x`
        assert of_experts is not None  # noqa: S101 -- as above
        # First, so that it is known which weights the experts need before they are multiplied.
        chosen, factors = self.run.route(of_router, mixture)
        if mixture.spread is not None:
            chosen, own = mixture.spread.here(chosen, factors[:, : mixture.top])
            factors = torch.cat([own, factors[:, mixture.top :]], 1)
        beside = None if layer.down is None else self._dense(layer, x)
        mixed = self.run.mix(of_experts, mixture, chosen, factors, beside)
        return mixed if mixture.spread is None else mixed.over_ranks()

    def _dense(self, layer: StepLayer, x: ProductInput) -> Tensor:
        assert layer.down is not None  # noqa: S101 -- only a layer with a mixture may have no network
        gate, *up = self._project(layer.gate_up, x)
        gated = self.run.gate(gate, up[0] if up else None, self.model.activation, [layer.down])
        return self._multiply(layer.down, gated)

    def _multiply(self, module: nn.Module, x: ProductInput) -> Tensor:
        """Multiply with a matrix that may be divided among ranks."""
        return joined(module, self.run.multiply(module, x))

    def _add_norm(
        self,
        norm: Norm | None,
        users: list[nn.Module],
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> ProductInput:
        """Add `delta` to the residual stream, and return the norm of the sum."""
        given = self.hidden, self.delta, self.after, norm, users, self.model.of_summands, scale, further
        self.hidden, x = self.run.add_norm(*given)
        self.delta = self.after = None
        return x

    def _project(self, projections: Projections, x: ProductInput) -> tuple[Tensor, ...]:
        found, widths = list[Tensor](), list(projections.widths)
        for module in projections.modules:
            product = self._multiply(module, x)
            at = 0
            while at < product.shape[1]:
                width = widths.pop(0)
                found.append(product[:, at : at + width])
                at += width
        return tuple(found)
