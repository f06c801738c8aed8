"""Attention of prompts against softmax and products in fp64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from q6k_kernels.generate import attention

HEADS, KEY_HEADS, SIZE = 6, 2, attention.WIDEST + 32


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    k, v = (each.double().repeat_interleave(HEADS // KEY_HEADS, dim=1) for each in (k, v))
    scores = (q.double() @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("size", [64, SIZE])
@pytest.mark.parametrize("masked", [False, True])
def test_prompts_of_any_size_of_heads(size: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several parts, the last of them short; with a mask there are more keys than queries."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    queries, keys = 21, 37 if masked else 21
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", HEADS * keys * 8)
    source = torch.Generator().manual_seed(size)
    q = torch.randn(1, queries, HEADS, size, generator=source).transpose(1, 2)  # as transformers' layers pass it
    k, v = (torch.randn(1, KEY_HEADS, keys, size, generator=source) for _ in range(2))
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if masked:
        seen &= ~seen.tril(keys - queries - 9)  # a window of 9
    attend = ALL_ATTENTION_FUNCTIONS[attention.implementation("plain")]
    for scaling in (None, 0.25):
        out, weights = attend(None, q, k, v, seen[None, None] if masked else None, scaling=scaling)
        assert weights is None
        right = expected(q, k, v, seen, size**-0.5 if scaling is None else scaling)
        torch.testing.assert_close(out.double(), right, atol=1e-5, rtol=1e-5)
