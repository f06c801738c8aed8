"""A gated delta net of a step or a chunk: its sizes and numbers, and its computation in plain torch.

A value head's state S is a matrix (key size, value size). With a token's q, k and v, after a convolution over the
last tokens, a decay d and a rate r it becomes

    S = d S;   S = S + k (r (v - k S));   and the output is q S

which is normed and gated. The numbers round where transformers' layer rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from q6k_kernels.models.delta_net import convolved, delta_rule


@dataclass(frozen=True)
class DeltaHeads:
    """The heads of a gated delta net.

    Attributes:
        key_heads: number of heads of q and k.
        value_heads: number of heads of v, a multiple of `key_heads`; neighbours share a key head.
        key_dim: size of a head of q and k.
        value_dim: size of a head of v.
        convolution: weights of the convolution, float32 (channels, tokens).
        decays: −exp(A_log) of transformers, float32 (value heads,).
        biases: added to a, float32 (value heads,).
        norm: weight of the norm of each head's output, float32 (value_dim,).
        epsilon: the norm's epsilon.
        tiled: whether the next product takes heads in another order: those that share a key head lie apart.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: Tensor
    decays: Tensor
    biases: Tensor
    norm: Tensor
    epsilon: float
    tiled: bool


def delta_net(
    mixed: Tensor, z: Tensor, b: Tensor, a: Tensor, heads: DeltaHeads, states: tuple[Tensor, Tensor]
) -> Tensor:
    """Compute outputs of tokens and update the states in place.

    Args:
        mixed: q, k and v before the convolution, (M, channels).
        z: gates of the outputs, (M, value heads * value_dim).
        b: rates before their sigmoid, (M, value heads).
        a: logarithms of decays before bias and softplus, (M, value heads).
        heads: the heads of the layer.
        states: the layer's last inputs of the convolution, (1, channels, tokens), and its matrices, float32 (1,
            value heads, key_dim, value_dim).

    Returns:
        (M, value heads * value_dim).
    """
    dtype, length = mixed.dtype, len(mixed)
    inputs, matrices = states
    seen = torch.cat([inputs[0], mixed.T], dim=1)
    inputs[0].copy_(seen[:, -inputs.shape[-1] :])
    activated = silu(convolved(seen.T[None], heads.convolution[:, None], length))
    keys = heads.key_heads * heads.key_dim
    parts = torch.split(activated, [keys, keys, heads.value_heads * heads.value_dim], -1)
    counts = (heads.key_heads, heads.key_heads, heads.value_heads)
    q, k, v = (part.view(1, length, count, -1) for part, count in zip(parts, counts, strict=True))
    decay = heads.decays * softplus(a.float() + heads.biases)
    out, matrix = delta_rule(q, k, v, decay[None], b.sigmoid()[None], matrices)
    matrices.copy_(matrix)
    out = out[0].to(dtype).float()
    out = (out * torch.rsqrt(out.square().mean(-1, keepdim=True) + heads.epsilon)).to(dtype)
    out = (heads.norm.to(dtype) * out).float() * silu(z.view(length, heads.value_heads, -1).float())
    if heads.tiled:
        out = out.view(length, heads.key_heads, -1, heads.value_dim).transpose(1, 2)
    return out.to(dtype).reshape(length, -1)
