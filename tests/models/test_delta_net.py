"""The delta rule in chunks, against its definition, token by token in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from q6k_kernels.models.delta_net import delta_rule


def by_tokens(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, decay, rate, state = (each.double() for each in (q, k, v, decay, rate, state))
    sharing, out = v.shape[2] // k.shape[2], torch.empty_like(v)
    for text in range(len(q)):
        for head in range(v.shape[2]):
            matrix = state[text, head]
            for at in range(q.shape[1]):
                one, other = (each[text, at, head // sharing] for each in (q, k))
                one, other = (each / (each @ each + 1e-6).sqrt() for each in (one, other))
                matrix = matrix * decay[text, at, head].exp()
                change = (v[text, at, head] - other @ matrix) * rate[text, at, head]
                matrix = matrix + other[:, None] * change
                out[text, at, head] = one @ matrix * len(one) ** -0.5
            state[text, head] = matrix
    return out, state


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 64), (16, 8), (21, 8)])
@pytest.mark.parametrize(("batch", "key_heads", "heads"), [(1, 2, 6), (2, 1, 1)])
def test_chunks_are_the_rule_token_by_token(
    length: int, chunk: int, batch: int, key_heads: int, heads: int
) -> None:
    random = torch.Generator().manual_seed(length + heads)
    q, k = (torch.randn(batch, length, key_heads, 8, generator=random) for _ in "qk")
    v = torch.randn(batch, length, heads, 4, generator=random)
    decay, rate = (torch.rand(batch, length, heads, generator=random) for _ in "dr")
    state = torch.randn(batch, heads, 8, 4, generator=random)
    out, after = delta_rule(q, k, v, -decay, rate, state, chunk)
    expected = by_tokens(q, k, v, -decay, rate, state.clone())
    torch.testing.assert_close((out.double(), after.double()), expected, rtol=1e-5, atol=1e-5)
    fresh, _ = delta_rule(q, k, v, -decay, rate, None, chunk)
    torch.testing.assert_close(fresh.double(), by_tokens(q, k, v, -decay, rate, 0 * state)[0], rtol=1e-5, atol=1e-5)
