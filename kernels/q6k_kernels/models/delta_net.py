"""A gated delta net for prompts of any length, in place of transformers' module of the same parts.

transformers computes chunks one after the other in some ten operations each, which keep a GPU waiting; here only
what depends on the state of the chunk before stays in the loop, three operations a chunk. All sums are in fp32.
Results round where transformers' module rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

CHUNK = 64
"""Tokens whose changes to the state are computed together."""
L2_EPSILON = 1e-6
_PARTS = ("conv1d", "norm", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_NUMBERS = ("dt_bias", "A_log")
_SIZES = (
    *("layer_idx", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"),
    *("key_dim", "value_dim", "conv_dim", "conv_kernel_size"),
)


class GatedDeltaNet(nn.Module):
    """The layer, with the parts of transformers' module and called like it.

    Args:
        of: transformers' module, whose parts it takes over.
    """

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        for name in (*_PARTS, *_NUMBERS, *_SIZES):
            setattr(self, name, getattr(of, name))

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **__: Any
    ) -> Tensor:
        """Return the layer's output, (B, T, hidden), and update the cache's states.

        Args:
            hidden_states: (B, T, hidden).
            cache_params: a cache of transformers, or ours; None for none.
            attention_mask: (B, T), 0 for padding before the text; None for none.
        """
        net: Any = self
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        batch, length, _ = hidden_states.shape
        state = None
        if cache_params is not None and cache_params.has_previous_state(net.layer_idx):
            state = cache_params.layers[net.layer_idx].recurrent_states[0]
        inputs = net.in_proj_qkv(hidden_states)
        z, b, a = (each(hidden_states) for each in (net.in_proj_z, net.in_proj_b, net.in_proj_a))
        if cache_params is not None:
            inputs = cache_params.update_conv_state(
                inputs.transpose(1, 2), net.layer_idx, conv_kernel_size=net.conv_kernel_size
            ).transpose(1, 2)
        mixed = silu(convolved(inputs, net.conv1d.weight, length))
        q, k, v = torch.split(mixed, [net.key_dim, net.key_dim, net.value_dim], -1)
        decay = -net.A_log.float().exp() * softplus(a.float() + net.dt_bias)
        out, state = delta_rule(
            q.view(batch, length, net.num_k_heads, -1),
            k.view(batch, length, net.num_k_heads, -1),
            v.view(batch, length, net.num_v_heads, -1),
            decay,
            b.sigmoid(),
            state,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(state, net.layer_idx)
        out = net.norm(out.to(mixed.dtype), z.reshape(out.shape))
        result: Tensor = net.out_proj(out.reshape(batch, length, -1))
        return result


def convolved(inputs: Tensor, weight: Tensor, length: int) -> Tensor:
    """Convolve the last `length` tokens of (B, T, channels) with those before them; weight (channels, 1, n)."""
    taps = weight[:, 0].float().T
    inputs = pad(inputs, (0, 0, max(0, length + len(taps) - 1 - inputs.shape[1]), 0))[
        :, -(length + len(taps) - 1) :
    ]
    found = inputs[:, :length] * taps[0]
    for at in range(1, len(taps)):
        found = torch.addcmul(found, inputs[:, at : at + length], taps[at])
    return found.to(inputs.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor | None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Compute outputs and the state of a gated delta net, S = exp(decay) S, S += k (rate (v - k S)), q S.

    Within a chunk the changes are the solution of a triangular system, for any state before it.

    Args:
        q: (B, T, key heads, dk), before its norm and scale.
        k: likewise.
        v: (B, T, value heads, dv); neighbours share a key head.
        decay: float32 (B, T, value heads), 0 or less.
        rate: (B, T, value heads).
        state: float32 (B, value heads, dk, dv); None for zeros.
        chunk: tokens of a chunk.

    Returns:
        Outputs, float32 (B, T, value heads, dv), and the state after the last token.
    """
    batch, length, key_heads, dk = k.shape
    heads, dv = v.shape[2:]
    sharing, size = heads // key_heads, min(chunk, length)
    chunks = -(-length // size)

    def arranged(x: Tensor) -> Tensor:
        """(B, T, heads, d) -> (chunks, B, key heads, heads that share one, tokens, d)."""
        x = pad(x.float(), (0, 0, 0, 0, 0, chunks * size - length))
        return x.view(batch, chunks, size, key_heads, -1, x.shape[-1]).permute(1, 0, 3, 4, 2, 5)

    q, k = (_unit(arranged(each)) for each in (q, k))
    q = q * dk**-0.5
    v, rate = arranged(v), arranged(rate[..., None])
    along = arranged(decay[..., None]).cumsum(-2)
    last = along[..., -1:, :]
    upper = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    between = (along - along.transpose(-1, -2)).masked_fill(upper, -torch.inf).exp()
    changes = torch.cat([v, k * along.exp()], -1) * rate
    if size > 1:
        system = (k @ k.transpose(-1, -2)) * between * rate
        changes = torch.linalg.solve_triangular(system, changes, upper=False, unitriangular=True)

    def rows(x: Tensor) -> Tensor:
        """Join the dimensions of batch and heads: (chunks, B * heads, ...), contiguous."""
        return x.expand(chunks, batch, key_heads, sharing, *x.shape[-2:]).reshape(
            chunks, batch * heads, *x.shape[-2:]
        )

    new, known = (rows(part) for part in torch.split(changes, [dv, dk], -1))
    stored, kept = rows(k * (last - along).exp()).transpose(-1, -2), rows(last.exp())
    first = new.new_zeros(batch * heads, dk, dv) if state is None else state.reshape(batch * heads, dk, dv)
    new, states = (_recorded if new.requires_grad else _in_place)(first, new, known, stored, kept)
    out = rows(q * along.exp()) @ states[:-1] + rows((q @ k.transpose(-1, -2)) * between) @ new
    out = out.view(chunks, batch, heads, size, dv).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, dv)
    return out[:, :length], states[-1].view(batch, heads, dk, dv)


def _in_place(first: Tensor, new: Tensor, known: Tensor, stored: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the changes of each chunk, written over `new`, and the states before each chunk and after the last."""
    states = new.new_empty(len(new) + 1, *first.shape)
    states[0] = first
    for at in range(len(new)):
        new[at].baddbmm_(known[at], states[at], alpha=-1)
        torch.mul(states[at], kept[at], out=states[at + 1])
        states[at + 1].baddbmm_(stored[at], new[at])
    return new, states


def _recorded(first: Tensor, new: Tensor, known: Tensor, stored: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by operations that have gradients."""
    changes, states = list[Tensor](), [first]
    for at in range(len(new)):
        changes.append(torch.baddbmm(new[at], known[at], states[at], alpha=-1))
        states.append(torch.baddbmm(states[at] * kept[at], stored[at], changes[at]))
    return torch.stack(changes), torch.stack(states)


def _unit(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + L2_EPSILON)
