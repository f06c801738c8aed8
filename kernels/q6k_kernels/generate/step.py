"""A decoding step of a whole model in few launches: products, and between them norms, attention and gates.

    step = Step(model, cache, operations)
    step.advance(choice)

transformers' modules hold the weights. Their computation for one token is written here again, with the choices of
the model's architecture (`models.architecture`). Residual sum, norm and quantisation are one launch; rotation,
cache and attention are another. The length of the text is only a number on the device, so one CUDA graph serves
every length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.step_reference import Cached, Heads, Norm, ProductInput, TokenChoice, capped
from q6k_kernels.models.architecture import LINEAR, SLIDING, Activation, attached
from q6k_kernels.models.fusing import GATE_UP, IN_PROJ, QK, QKV, Group, ReorderedInput, Stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Q = Group("q_proj", ("q_proj",))
"""The projection of a layer that uses the keys and values of an earlier one."""
ANGLES_AT_ONCE = 8192
"""Positions whose angles are computed at once."""


class StepOperations(Protocol):
    """The operations of a step: `step_reference.TorchOperations` specifies them, `step_cuda.Kernels` is fast."""

    def supports(self, hidden: int, between: int, heads: Heads | DeltaHeads) -> str: ...  # noqa: D102
    def reserve(self, heads: Heads | DeltaHeads) -> None: ...  # noqa: D102
    def add_norm(  # noqa: D102
        self,
        hidden: Tensor,
        delta: Tensor | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
    ) -> tuple[Tensor, ProductInput]: ...
    def gate(  # noqa: D102
        self, gate: Tensor, up: Tensor, activation: Activation, users: list[nn.Module]
    ) -> ProductInput: ...
    def attend(  # noqa: D102
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput: ...
    def delta(  # noqa: D102
        self,
        mixed: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        heads: DeltaHeads,
        states: tuple[Tensor, Tensor],
        users: list[nn.Module],
    ) -> ProductInput: ...
    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor: ...  # noqa: D102
    def choose(self, logits: Tensor, softcap: float | None, choice: TokenChoice) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class _Projections:
    """Projections that share their input: modules for one or more of them, and the columns of each."""

    modules: list[nn.Module]
    widths: list[int]


@dataclass(frozen=True)
class _ByToken:
    """The end of a layer that has an embedding of its own for each token: a gate of it, and its projection."""

    gate: nn.Module
    output: nn.Module
    after: Norm


@dataclass(frozen=True)
class _StepLayer:
    norm: Norm
    inputs: _Projections
    heads: Heads | DeltaHeads
    output: nn.Module
    after_attention: Norm | None
    norm_between: Norm
    gate_up: _Projections
    between: int
    down: nn.Module
    after: Norm | None
    by_token: _ByToken | None
    scale: float


class Step:
    """The decoding step of a model.

    Args:
        model: a model from `load_model`.
        cache: the model's cache. Its buffers must exist when the step is called, so run a prompt first.
        operations: the operations to run.

    Raises:
        UnsupportedModelError: the model is not from `load_model`, or the operations do not support its sizes.
    """

    def __init__(self, model: PreTrainedModel, cache: KeyValueCache, operations: StepOperations) -> None:
        architecture = attached(model)
        if architecture is None:
            raise _unsupported(f"a {type(model).__name__} that load_model has not made")
        if not architecture.stepped:
            raise _unsupported(f"layers of {architecture.name}")
        config: Any = model.config
        self._architecture, self._epsilon = architecture, float(config.rms_norm_eps)
        self._cache, self._operations = cache, operations
        inner: Any = model.model
        self._inner = inner
        self._embedding: nn.Module = model.get_input_embeddings()
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._softcap = architecture.softcap_of_logits(config)
        multipliers = architecture.multipliers
        self._of_embedding = config.embedding_multiplier if multipliers else 1.0
        self._of_summands = config.residual_multiplier if multipliers else 1.0
        # What divides the logits may as well divide the head's input.
        self._norm = self._norm_of(inner.norm, 1 / config.logits_scaling if multipliers else 1.0)
        self._growth = _growth(architecture.growth_of_queries(config), cache)
        angles = {
            kind: _angles(inner.rotary_emb, (kind,) if architecture.angles_by_kind else (), cache)
            for kind in set(cache.kinds) - {LINEAR}
        }
        self._layers = [
            self._layer(layer, config, angles.get(kind))
            for layer, kind in zip(inner.layers, cache.kinds, strict=True)
        ]
        for layer in self._layers:
            if reason := operations.supports(config.hidden_size, layer.between, layer.heads):
                raise _unsupported(reason)
            operations.reserve(layer.heads)

    def advance(self, choice: TokenChoice) -> None:
        """Run one step: the last token through the model, then the choice of the next.

        Args:
            choice: where to find the last token and put the next; its position must be the cache's tensor.
        """
        self._operations.choose(self._logits(choice.token), self._softcap, choice)

    def __call__(self, token: Tensor) -> Tensor:
        """Return the logits, float32 (1, V), that follow a token, int64 (1,), at the cache's position."""
        return capped(self._logits(token), self._softcap)

    @torch.no_grad()
    def _logits(self, token: Tensor) -> Tensor:
        run = self._operations
        hidden: Tensor = self._embedding(token)
        if self._of_embedding != 1.0:
            hidden = hidden * self._of_embedding
        delta: Tensor | None = None
        after: Norm | None = None
        scale = 1.0
        of_layers = self._embeddings_of_layers(token, hidden)
        for index, layer in enumerate(self._layers):
            hidden, x = self._add_norm(hidden, delta, after, layer.norm, layer.inputs.modules, scale)
            x = self._mixed(index, layer, self._project(layer.inputs, x))
            delta, after = run.multiply(layer.output, x), layer.after_attention
            hidden, x = self._add_norm(hidden, delta, after, layer.norm_between, layer.gate_up.modules)
            gate, up = self._project(layer.gate_up, x)
            x = run.gate(gate, up, self._architecture.activation, [layer.down])
            delta, after, scale = run.multiply(layer.down, x), layer.after, layer.scale
            if (end := layer.by_token) is not None:
                hidden, x = self._add_norm(hidden, delta, after, None, [end.gate])
                x = run.gate(
                    run.multiply(end.gate, x), of_layers[index], self._architecture.activation, [end.output]
                )
                delta, after = run.multiply(end.output, x), end.after
        _, x = self._add_norm(hidden, delta, after, self._norm, [self._head], scale)
        return run.multiply(self._head, x)

    def _add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        scale: float = 1.0,
    ) -> tuple[Tensor, ProductInput]:
        return self._operations.add_norm(hidden, delta, after, norm, users, self._of_summands, scale)

    def _embeddings_of_layers(self, token: Tensor, hidden: Tensor) -> list[Tensor]:
        """Return each layer's embedding of the token, (1, size), if layers have them."""
        if all(layer.by_token is None for layer in self._layers):
            return []
        inner = self._inner
        found: Tensor = inner.project_per_layer_inputs(hidden[None], inner.get_per_layer_inputs(token[None]))
        return list(found[0].transpose(0, 1))

    def _mixed(self, index: int, layer: _StepLayer, products: tuple[Tensor, ...]) -> ProductInput:
        """Mix a token with those before it: by attention to their keys, or by a state."""
        heads, users = layer.heads, [layer.output]
        if isinstance(heads, DeltaHeads):
            mixed, z, b, a = products
            return self._operations.delta(mixed, z, b, a, heads, self._cache.states.of(index), users)
        q, *key_and_value = products
        # Without a projection of their own, values are keys; without any, both are those of an earlier layer.
        k, v = (key_and_value[0], key_and_value[-1]) if key_and_value else (None, None)
        keys, values = self._cache.buffers(index)
        window = self._cache.window if self._cache.kinds[index] == SLIDING else 0
        cached = Cached(keys, values, window)
        return self._operations.attend(q, k, v, heads, cached, self._cache.position, users)

    def _project(self, projections: _Projections, x: ProductInput) -> tuple[Tensor, ...]:
        found, widths = list[Tensor](), list(projections.widths)
        for module in projections.modules:
            product = self._operations.multiply(module, x)
            at = 0
            while at < product.shape[1]:
                width = widths.pop(0)
                found.append(product[:, at : at + width])
                at += width
        return tuple(found)

    def _layer(self, layer: Any, config: Any, angles: tuple[Tensor, Tensor] | None) -> _StepLayer:
        network, after = layer.mlp, self._architecture.norms_after
        inputs, heads, output = (
            _delta_net(layer.linear_attn) if angles is None else self._attention(layer.self_attn, config, angles)
        )
        # In transformers' Llama the norm before the feed-forward network is named `post_attention_layernorm`.
        between = layer.pre_feedforward_layernorm if after else layer.post_attention_layernorm
        between_gate_and_down = network.down_proj.in_features
        return _StepLayer(
            norm=self._norm_of(layer.input_layernorm),
            inputs=inputs,
            heads=heads,
            output=output,
            after_attention=self._norm_of(layer.post_attention_layernorm) if after else None,
            norm_between=self._norm_of(between),
            gate_up=_projections(network, GATE_UP, [between_gate_and_down] * 2),
            between=between_gate_and_down,
            down=network.down_proj,
            after=self._norm_of(layer.post_feedforward_layernorm) if after else None,
            by_token=self._by_token(layer) if getattr(config, "hidden_size_per_layer_input", 0) else None,
            scale=float(layer.layer_scalar) if self._architecture.scaled_layers else 1.0,
        )

    def _attention(
        self, attention: Any, config: Any, angles: tuple[Tensor, Tensor]
    ) -> tuple[_Projections, Heads, nn.Module]:
        head_norms, gated = self._architecture.head_norms, self._architecture.gated_attention
        dim, count = attention.head_dim, config.num_attention_heads
        key_heads = count // attention.num_key_value_groups
        has_keys = hasattr(attention, "k_proj")
        group = QKV if getattr(attention, "v_proj", None) is not None else QK if has_keys else Q
        if self._architecture.unrotated_layers and not attention.use_rope:
            angles = torch.ones_like(angles[0]), torch.zeros_like(angles[1])
        heads = Heads(
            count=count,
            key_heads=key_heads,
            dim=dim,
            scale=attention.scaling,
            softcap=self._architecture.softcap_of_scores(config),
            q_norm=self._norm_of(attention.q_norm) if head_norms else None,
            k_norm=self._norm_of(attention.k_norm) if head_norms and has_keys else None,
            cosines=angles[0],
            sines=angles[1],
            values_normed=self._architecture.value_norms,
            growth=self._growth,
            gated=gated,
        )
        widths = [count * dim * (1 + gated), key_heads * dim, key_heads * dim][: len(group.parts)]
        return _projections(attention, group, widths), heads, attention.o_proj

    def _by_token(self, layer: Any) -> _ByToken:
        after = self._norm_of(layer.post_per_layer_input_norm)
        return _ByToken(layer.per_layer_input_gate, layer.per_layer_projection, after)

    def _norm_of(self, module: Any, factor: float = 1.0) -> Norm:
        weight = (module.weight.detach().float() + self._architecture.norm_offset) * factor
        return Norm(weight.contiguous(), self._epsilon)


def _delta_net(net: Any) -> tuple[_Projections, DeltaHeads, nn.Module]:
    heads = DeltaHeads(
        key_heads=net.num_k_heads,
        value_heads=net.num_v_heads,
        key_dim=net.head_k_dim,
        value_dim=net.head_v_dim,
        convolution=net.conv1d.weight.detach().squeeze(1).float().contiguous(),
        decays=-net.A_log.detach().float().exp(),
        biases=net.dt_bias.detach().float().contiguous(),
        norm=net.norm.weight.detach().float().contiguous(),
        epsilon=float(net.norm.variance_epsilon),
        tiled=isinstance(net.out_proj, ReorderedInput),
    )
    widths = [net.conv_dim, net.value_dim, net.num_v_heads, net.num_v_heads]
    return _projections(net, IN_PROJ, widths), heads, net.out_proj.linear if heads.tiled else net.out_proj


def _projections(module: Any, group: Group, widths: list[int]) -> _Projections:
    joined = getattr(module, group.name, None)
    if joined is None:
        return _Projections([getattr(module, part) for part in group.parts], widths)
    return _Projections(list(joined.layers) if isinstance(joined, Stacks) else [joined], widths)


def _angles(rotary: Any, kind: tuple[str, ...], cache: KeyValueCache) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the rotary angles of all positions, float32 (slots, dim / 2)."""
    tables: tuple[list[Tensor], list[Tensor]] = [], []
    dtype_of = torch.empty(0, device=cache.device)
    for begin in range(0, cache.slots, ANGLES_AT_ONCE):
        positions = torch.arange(begin, min(begin + ANGLES_AT_ONCE, cache.slots), device=cache.device)
        for table, both in zip(tables, rotary(dtype_of, positions[None], *kind), strict=True):
            table.append(both[0, :, : both.shape[-1] // 2])
    cosines, sines = (torch.cat(table).contiguous() for table in tables)
    return cosines, sines


def _growth(formula: tuple[float, int] | None, cache: KeyValueCache) -> Tensor | None:
    """Compute the factors of queries of all positions, float32 (slots,); see `Architecture.growth_of_queries`."""
    if formula is None:
        return None
    factor, positions = formula
    return 1 + factor * torch.log1p(torch.arange(cache.slots, device=cache.device) // positions)


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"no fused decoding step for {what}", "Generate with fused=False.")
