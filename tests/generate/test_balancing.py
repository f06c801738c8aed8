"""Queries and keys of like sizes: without codes the same results, for all forms of heads; with codes less error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dense_cases import DENSE
from model_cases import MODELS
from q6k_kernels.generate.balancing import balanced, factors, multiplied
from q6k_kernels.generate.cache_codes import coded, decoded, mixed
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Heads, Norm
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.models.architecture import attach
from q6k_kernels.models.registry import ARCHITECTURES

DIM, KEY_HEADS, GROUP, ROTATED = 16, 2, 3, 12


def heads(part: Any = "head", *, neighbours: bool = False) -> Heads:
    torch.manual_seed(len(part) + neighbours)
    whole = part == "projection"
    widths = (KEY_HEADS * GROUP * DIM, KEY_HEADS * DIM) if whole else (DIM, DIM)
    norms = [Norm(torch.randn(width).exp(), 1e-6) for width in widths]
    angles = torch.arange(9.0)[:, None] * torch.rand(ROTATED // 2)
    sizes = KEY_HEADS * GROUP, KEY_HEADS, DIM, 0.25, None
    return Heads(*sizes, *norms, angles.cos(), angles.sin(), normed=part, neighbours=neighbours)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("part", ["head", "projection", "rotated head"])
def test_values_that_rotate_together_have_one_factor(part: Any, neighbours: bool) -> None:
    """The formula, head by head and value by value; a norm after the rotation has factors for single values."""
    given = heads(part, neighbours=neighbours)
    by = factors(given)
    assert by is not None
    whole = part == "projection"
    assert by.shape == ((KEY_HEADS if whole else 1), DIM)
    queries, keys = (norm.weight.double().square().tolist() for norm in (given.q_norm, given.k_norm) if norm)
    for head in range(len(by)):
        for d in range(DIM):
            pair = [d]
            if d < ROTATED and part != "rotated head":
                pair = [d, d ^ 1 if neighbours else (d + ROTATED // 2) % ROTATED]
            of_group = range(head * GROUP, (head + 1) * GROUP) if whole else [0]
            query = sum(queries[each * DIM + at] for each in of_group for at in pair) / len(of_group)
            assert float(by[head, d]) == pytest.approx((query / sum(keys[head * DIM + at] for at in pair)) ** 0.25)


def test_weights_of_zero_have_bounded_factors() -> None:
    given = heads()
    assert given.q_norm is not None
    assert given.k_norm is not None
    given.q_norm.weight[3:11] = 0.0
    given.k_norm.weight[:5] = 0.0
    by = factors(given)
    assert by is not None
    assert by.isfinite().all()
    assert float(by.max() / by.min()) <= 2.0**10
    given.k_norm.weight[:] = 0.0
    of_none = multiplied(given, factors(given))
    assert of_none.k_norm is not None
    assert not of_none.k_norm.weight.any()


def test_scores_of_codes_have_smaller_errors() -> None:
    """Less than half, where one value of keys is large and that of queries small, as trained models have it."""
    large = torch.ones(DIM)
    large[-1] = 30.0
    uneven = replace(heads(), q_norm=Norm(1 / large, 1e-6), k_norm=Norm(large, 1e-6))

    def error(of: Heads) -> float:
        torch.manual_seed(1)
        assert of.q_norm is not None
        assert of.k_norm is not None
        queries, keys = (mixed(norm(torch.randn(200, DIM))) for norm in (of.q_norm, of.k_norm))
        return float((queries @ (decoded(*coded(keys)) - keys).T).square().mean().sqrt())

    assert error(multiplied(uneven, factors(uneven))) < error(uneven) / 2


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "hunyuan-dense", "gemma3", "gemma4, shared keys", "qwen35"])
def test_a_model_stays_the_same(name: str) -> None:
    """Its logits from a cache without codes, up to rounding, also where layers use the keys of others."""
    case = {**MODELS, **DENSE}[name]
    model = case.make()
    attach(model, ARCHITECTURES[case.architecture])
    cache = KeyValueCache(model.config, 40, torch.device("cpu"))
    step = Step(model, cache, TorchOperations())
    ids = torch.randint(3, 96, (30,), generator=torch.Generator().manual_seed(2))
    before, kept = step.chunk(ids, 0, last=True, every=True), step._model.layers
    step._model.layers = balanced(kept, cache.source)
    after = step.chunk(ids, 0, last=True, every=True)
    assert before is not None
    assert after is not None
    assert float((after - before).abs().max()) < 1e-4 * float(before.std())
    changed = 0
    for old, new in zip(kept, step._model.layers, strict=True):
        if isinstance(old.heads, DeltaHeads):
            assert new is old
            continue
        assert not isinstance(new.heads, DeltaHeads)
        assert old.heads.q_norm is not None
        assert new.heads.q_norm is not None
        changed += not torch.equal(old.heads.q_norm.weight, new.heads.q_norm.weight)
    assert changed == sum(not isinstance(each.heads, DeltaHeads) for each in kept)
