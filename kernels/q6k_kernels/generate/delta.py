"""A gated delta net of a decoding step: its sizes and numbers, and its computation in plain torch.

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

L2_EPSILON = 1e-6


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
    """Compute a token's outputs and update the states in place.

    Args:
        mixed: q, k and v before the convolution, (1, channels).
        z: gates of the outputs, (1, value heads * value_dim).
        b: rates before their sigmoid, (1, value heads).
        a: logarithms of decays before bias and softplus, (1, value heads).
        heads: the heads of the layer.
        states: the layer's last inputs of the convolution, (1, channels, tokens), and its matrices, float32 (1,
            value heads, key_dim, value_dim).

    Returns:
        (1, value heads * value_dim).
    """
    dtype = mixed.dtype
    inputs, matrices = states
    inputs.copy_(torch.cat([inputs[:, :, 1:], mixed[:, :, None]], dim=2))
    convolved = (inputs[0].float() * heads.convolution).sum(-1).to(dtype)
    activated = silu(convolved).float()
    keys = heads.key_heads * heads.key_dim
    q, k, v = torch.split(activated, [keys, keys, heads.value_heads * heads.value_dim])
    sharing = heads.value_heads // heads.key_heads
    q, k = (_unit(each.view(heads.key_heads, -1)).repeat_interleave(sharing, dim=0) for each in (q, k))
    v = v.view(heads.value_heads, -1)
    decay = (heads.decays * softplus(a[0].float() + heads.biases)).exp()
    rate = b[0].sigmoid().float()
    matrix = matrices[0] * decay[:, None, None]
    change = (v - (matrix * k[:, :, None]).sum(1)) * rate[:, None]
    matrix = matrix + k[:, :, None] * change[:, None]
    matrices[0].copy_(matrix)
    out = (matrix * (q * heads.key_dim**-0.5)[:, :, None]).sum(1).to(dtype).float()
    out = (out * torch.rsqrt(out.square().mean(-1, keepdim=True) + heads.epsilon)).to(dtype)
    out = (heads.norm.to(dtype) * out).float() * silu(z.view(heads.value_heads, -1).float())
    if heads.tiled:
        out = out.view(heads.key_heads, sharing, -1).transpose(0, 1)
    y: Tensor = out.to(dtype).reshape(1, -1)
    return y


def _unit(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + L2_EPSILON)
