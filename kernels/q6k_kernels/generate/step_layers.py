"""The layers of a decoding step, from transformers' modules: their norms, projections and heads.

Each is what a module computes, with the choices of the model's architecture (`models.architecture`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Heads, Norm
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.mixture import Mixture, MixtureNorms
from q6k_kernels.models.architecture import LINEAR, Architecture
from q6k_kernels.models.fusing import GATE_UP, IN_PROJ, QK, QKV, Group, ReorderedInput, Stacks
from q6k_kernels.models.layer import ExpertsForm, Rotation
from q6k_kernels.models.ranks import SpreadExperts
from q6k_kernels.weights.layers import PackedLinear

Q, UP = Group("q_proj", ("q_proj",)), Group("up_proj", ("up_proj",))
"""The projections of a layer that uses the keys and values of an earlier one, and of a network without a gate."""
ANGLES_AT_ONCE = 8192
"""Positions whose angles are computed at once."""


@dataclass(frozen=True)
class Projections:
    """Projections that share their input: modules for one or more of them, and the columns of each."""

    modules: list[nn.Module]
    widths: list[int]


@dataclass(frozen=True)
class ByToken:
    """The end of a layer that has an embedding of its own for each token: a gate of it, and its projection."""

    gate: nn.Module
    output: nn.Module
    after: Norm


@dataclass(frozen=True)
class StepLayer:
    """A layer: what mixes a token with those before it, and the feed-forward network.

    Attributes:
        norm: norm before the mixing, or None.
        inputs: projections of what is mixed.
        heads: attention's heads, or those of a gated delta net.
        output: projection of what was mixed.
        after_attention: norm after it, or None.
        norm_between: norm before the network, or None.
        gate_up: projections of the network's gate and of what it gates; one if it has no gate.
        between: width between those and `down`.
        down: projection of the gated; None if the layer has no network but a mixture.
        after: norm after the network, or None.
        by_token: the end of a layer with embeddings of its own, or None.
        scale: factor of the layer's result.
        mixture: experts, or None; the network stands beside them.
        parallel: whether the network sees what the mixing sees, rather than its result.
    """

    norm: Norm | None
    inputs: Projections
    heads: Heads | DeltaHeads
    output: nn.Module
    after_attention: Norm | None
    norm_between: Norm | None
    gate_up: Projections
    between: int
    down: nn.Module | None
    after: Norm | None
    by_token: ByToken | None
    scale: float
    mixture: Mixture | None
    parallel: bool

    @property
    def of_network(self) -> list[nn.Module]:
        """The modules that see the network's input."""
        apart = self.mixture is None or self.mixture.norms is not None
        return [*self.gate_up.modules, *([] if self.mixture is None or apart else [self.mixture.experts])]

    @property
    def norms_of_mixture(self) -> tuple[Norm, Norm] | None:
        """The norms of what a mixture's router and experts see, if they are others than the network's."""
        norms = None if self.mixture is None else self.mixture.norms
        return None if norms is None else (norms.router, norms.experts)


class Layers:
    """Makes the layers of one model.

    Args:
        architecture: the model's architecture.
        config: its configuration.
        inner: transformers' model without its head.
        cache: the model's cache.
    """

    def __init__(self, architecture: Architecture, config: Any, inner: Any, cache: KeyValueCache) -> None:
        self._architecture, self._config = architecture, config
        self._epsilon = float(config.layer_norm_eps if architecture.norms.centred else config.rms_norm_eps)
        self._growth = _growth(architecture.growth_of_queries(config), cache)
        rotary, rotation = inner.rotary_emb, architecture.rotation
        # Kinds of layers may each have their own angles.
        self._angles = {
            kind: _angles(rotary, (kind,) if kind in config.rope_parameters else (), rotation, cache)
            for kind in set(cache.kinds) - {LINEAR}
        }

    def layer(self, layer: Any, kind: str) -> StepLayer:
        """Return a layer of transformers of a kind."""
        config, angles, norms = self._config, self._angles.get(kind), self._architecture.norms
        network, mixture = self._networks(layer)
        embedded = self._architecture.embedded_layers and config.hidden_size_per_layer_input
        inputs, heads, output = (
            _delta_net(layer.linear_attn) if angles is None else self._attention(layer.self_attn, angles)
        )
        width = 0 if network is None else network.down_proj.in_features
        group = GATE_UP if self._architecture.gated_network else UP
        return StepLayer(
            norm=self._named(layer, norms.before),
            inputs=inputs,
            heads=heads,
            output=output,
            after_attention=self._named(layer, norms.after_attention),
            norm_between=self._named(layer, norms.between),
            gate_up=(
                Projections([], []) if network is None else _projections(network, group, [width] * len(group.parts))
            ),
            between=width,
            down=None if network is None else network.down_proj,
            after=self._named(layer, norms.after),
            by_token=self._by_token(layer) if embedded else None,
            scale=float(layer.layer_scalar) if self._architecture.scaled_layers else 1.0,
            mixture=mixture,
            parallel=norms.parallel,
        )

    def _attention(self, attention: Any, angles: tuple[Tensor, Tensor]) -> tuple[Projections, Heads, nn.Module]:
        config, norms = self._config, self._architecture.head_norms
        gated, rotation = self._architecture.gated_attention, self._architecture.rotation
        dim: int = attention.head_dim
        count = attention.o_proj.in_features // dim  # of a model on several ranks, this one's
        key_heads = count // attention.num_key_value_groups
        joined = not hasattr(attention, "q_proj")  # in the file already
        has_keys = joined or hasattr(attention, "k_proj")
        has_values = joined or getattr(attention, "v_proj", None) is not None
        group = QKV if has_values else QK if has_keys else Q
        if not rotation.rotates(attention):
            angles = torch.ones_like(angles[0]), torch.zeros_like(angles[1])
        heads = Heads(
            count=count,
            key_heads=key_heads,
            dim=dim,
            scale=attention.scaling,
            softcap=self._architecture.softcap_of_scores(config),
            q_norm=None if norms is None else self._named(attention, norms.q),
            k_norm=None if norms is None or not has_keys else self._named(attention, norms.k),
            cosines=angles[0],
            sines=angles[1],
            values_normed=self._architecture.value_norms,
            growth=self._growth,
            gated=gated,
            normed="head" if norms is None else norms.part,
            neighbours=rotation.neighbours,
            sinks=attention.sinks.detach().float() if self._architecture.sinks else None,
        )
        widths = [count * dim * (1 + gated), key_heads * dim, key_heads * dim][: len(group.parts)]
        return _projections(attention, group, widths), heads, attention.o_proj

    def _networks(self, layer: Any) -> tuple[Any, Mixture | None]:
        """Return a layer's feed-forward network, or the expert that all tokens share, and its mixture; or None."""
        form = self._architecture.experts
        if form is None:
            return layer.mlp, None
        if form.beside:
            return layer.mlp, self._normed_mixture(layer) if self._config.enable_moe_block else None
        return getattr(layer.mlp, form.shared) if form.shared else None, _mixture(layer.mlp, form)

    def _normed_mixture(self, layer: Any) -> Mixture:
        """Return the mixture of a layer of Gemma 4, which stands beside its network."""
        router, projection = layer.router, layer.router.proj
        scale = router.scale.detach().float() * router.scalar_root_size
        packed = isinstance(projection, PackedLinear)
        weight = projection.weight.dequantize(router.scale.dtype) if packed else projection.weight.detach()
        norms = MixtureNorms(
            router=Norm(scale.contiguous(), self._epsilon),
            experts=self.norm(layer.pre_feedforward_layernorm_2),
            after_experts=self.norm(layer.post_feedforward_layernorm_2),
            after_beside=self.norm(layer.post_feedforward_layernorm_1),
        )
        scales = router.per_expert_scale.detach().float().contiguous()
        top = self._config.top_k_experts
        experts, spread = _here(layer.experts)
        return Mixture(weight.contiguous(), experts, len(weight), top, scales, norms, spread=spread)

    def _by_token(self, layer: Any) -> ByToken:
        after = self.norm(layer.post_per_layer_input_norm)
        return ByToken(layer.per_layer_input_gate, layer.per_layer_projection, after)

    def norm(self, module: Any, factor: float = 1.0) -> Norm:
        """Return a norm of transformers, its weights multiplied by a factor."""
        weight = (module.weight.detach().float() + self._architecture.norm_offset) * factor
        return Norm(weight.contiguous(), self._epsilon, self._architecture.norms.centred)

    def _named(self, module: Any, name: str) -> Norm | None:
        return self.norm(getattr(module, name)) if name else None


def _delta_net(net: Any) -> tuple[Projections, DeltaHeads, nn.Module]:
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


def _mixture(network: Any, form: ExpertsForm) -> Mixture:
    """Return the mixture of a network of transformers: its router, experts, perhaps a shared expert's gate."""
    router = getattr(network, form.router)
    weight, bias = router.weight.detach(), router.bias.detach() if form.biased else None
    count = len(weight)
    if form.shared:
        weight = torch.cat([weight, getattr(network, f"{form.shared}_gate").weight.detach()])
    experts, spread = _here(network.experts)
    return Mixture(weight.contiguous(), experts, count, router.top_k, bias=bias, spread=spread)


def _here(experts: nn.Module) -> tuple[nn.Module, SpreadExperts | None]:
    """Return the experts of this rank, and which they are if they are not all."""
    return (experts.experts, experts) if isinstance(experts, SpreadExperts) else (experts, None)


def _projections(module: Any, group: Group, widths: list[int]) -> Projections:
    joined = getattr(module, group.name, None)
    if joined is None:
        return Projections([getattr(module, part) for part in group.parts], widths)
    return Projections(list(joined.layers) if isinstance(joined, Stacks) else [joined], widths)


def _angles(rotary: Any, kind: tuple[str, ...], rotation: Rotation, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the rotary angles of all positions, float32 (slots, pairs of a head)."""
    tables: tuple[list[Tensor], list[Tensor]] = [], []
    dtype_of = torch.empty(0, device=cache.device)
    for begin in range(0, cache.slots, ANGLES_AT_ONCE):
        positions = torch.arange(begin, min(begin + ANGLES_AT_ONCE, cache.slots), device=cache.device)
        given = positions[None] if rotation.axes == 1 else positions.expand(rotation.axes, 1, -1)
        for table, both in zip(tables, rotary(dtype_of, given, *kind), strict=True):
            angles = both[0]
            forms = {"halves": angles.chunk(2, -1)[0], "neighbours": angles[:, ::2], "once": angles}
            table.append(forms[rotation.angles])
    cosines, sines = (torch.cat(table).contiguous() for table in tables)
    return cosines, sines


def _growth(formula: tuple[float, int] | None, cache: KeyValueCache) -> Tensor | None:
    """Compute the factors of queries of all positions, float32 (slots,); see `Architecture.growth_of_queries`."""
    if formula is None:
        return None
    factor, positions = formula
    return 1 + factor * torch.log1p(torch.arange(cache.slots, device=cache.device) // positions)
