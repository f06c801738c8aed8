"""Our own decoding step on the CPU: whole models against transformers' own, its pieces against formulas in fp64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import ANSWER, FAMILIES, WINDOW, expected, prompt, tiny
from model_cases import MODELS, largest_difference
from q6k_kernels import PackedLinear, load_model
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate import step_layers as stepping
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.sampling import gumbel_noise
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_reference import TokenChoice, TorchOperations
from q6k_kernels.generate.stepping import step_for
from q6k_kernels.models.cache_layout import SLACK
from tiny_models import F16, Q3_K

CPU = torch.device("cpu")
PAST = WINDOW + SLACK + 19
"""Tokens after which a ring has wrapped."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other with matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def stepped(model: Any, ids: list[int], prefilled: int) -> Tensor:
    """Logits of the tokens after each but the first, (length - prefilled, V), by steps from there on."""
    generator = Generator(model, capacity=len(ids) + 3, fused=True)
    generator.prefill(ids[:prefilled])
    step, position = generator._fused_step, generator.cache.position
    assert step is not None
    rows = []
    for at, token in enumerate(ids[prefilled:], prefilled):
        assert int(position) == at
        rows.append(step(torch.tensor([token]))[0])
        position += 1
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, 8) for name in MODELS),
        *((name, PAST) for name in ("mistral as llama", "gemma3, untied, capped")),
    ],
)
def test_logits_are_those_of_transformers(name: str, steps: int, tmp_path: Path) -> None:
    """Of one pass over the whole text, without a cache."""
    out, reference = MODELS[name].bundle(tmp_path)
    ids = text(12 + steps)
    whole = reference(torch.tensor([ids])).logits[0, 12:]
    assert largest_difference(stepped(load_model(out), ids, 12), whole) < 5e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_some_weights_packed_and_some_not(name: str, tmp_path: Path) -> None:
    """So that projections are joined in one layer and apart in the next."""
    types = {"blk.0.attn_v*": Q3_K, "blk.1.ffn_up*": F16, "token_embd*": Q3_K, "blk.1.attn_output*": F16}
    out, reference = replace(MODELS[name], types=types).bundle(tmp_path)
    model: Any = load_model(out)
    assert not hasattr(model.model.layers[0].self_attn, "qkv_proj")
    assert isinstance(model.model.layers[1].self_attn.qkv_proj, PackedLinear)
    ids = text(20)
    assert largest_difference(stepped(model, ids, 12), reference(torch.tensor([ids])).logits[0, 12:]) < 5e-5


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen35"])
def test_the_best_tokens_are_those_of_transformers(family: str) -> None:
    generator = Generator(tiny(family), capacity=200, fused=True)
    assert generator.fused
    generator.prefill(prompt())
    answer = list(generator.generate(ANSWER))
    assert answer == expected(family)
    generator.reset()  # and one step serves all lengths
    generator.prefill(prompt())
    generator.prepare(100)
    assert list(generator._recorder.made) == [(generator.cache.slots, 1)]
    assert list(generator.generate(100))[:ANSWER] == answer


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen35"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_tokens_are_those_of_the_other_steps(family: str, temperature: float) -> None:
    answers = []
    for fused in (False, True):
        generator = Generator(tiny(family), capacity=150, temperature=temperature, seed=5, fused=fused)
        generator.prefill(prompt())
        answers.append(list(generator.generate(PAST + 20)))
    assert answers[0] == answers[1]


def test_angles_do_not_depend_on_how_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KeyValueCache(tiny("gemma3").config, 50, CPU)
    step = Step(tiny("gemma3"), cache, TorchOperations())
    monkeypatch.setattr(stepping, "ANGLES_AT_ONCE", 7)
    other = Step(tiny("gemma3"), cache, TorchOperations())
    for one, two in zip(step._model.layers, other._model.layers, strict=True):
        assert one.heads.cosines.shape == (cache.slots, 4)
        assert torch.equal(one.heads.cosines, two.heads.cosines)
        assert torch.equal(one.heads.sines, two.heads.sines)


def test_models_without_such_a_step_are_named() -> None:
    model = tiny("llama")
    cache = KeyValueCache(model.config, 30, CPU)
    other = type(model)(model.config)
    with pytest.raises(
        UnsupportedModelError, match="for a LlamaForCausalLM that load_model has not made"
    ) as caught:
        Generator(other, capacity=30, fused=True)
    assert "fused=False" in str(caught.value)
    assert not Generator(other, capacity=30).fused
    assert Generator(copy.deepcopy(model), capacity=30, fused=True).fused

    gpu = torch.device("cuda")
    with pytest.raises(UnsupportedModelError, match="on a GPU for torch.float32: there are bfloat16"):
        step_for(tiny("llama"), cache, gpu, True)
    assert step_for(tiny("llama"), cache, gpu, None) is None

    class Few(TorchOperations):
        def supports(self, hidden: int, between: int, heads: Heads) -> str:
            return f"{hidden}, {between} and {heads.dim}"

    with pytest.raises(UnsupportedModelError, match="no fused decoding step for 32, 48 and 8"):
        Step(tiny("llama"), cache, Few())


def test_a_step_comes_after_a_prompt() -> None:
    generator = Generator(tiny("llama"), capacity=30, fused=True)
    with pytest.raises(RuntimeError, match="layer 2 has no keys yet: run a prompt through the model first"):
        generator.cache.buffers(2)
    with pytest.raises(RuntimeError, match="layer 0 has no keys yet"):
        generator.step(30)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def normed(x: Tensor, norm: Norm) -> Tensor:
    x = x.double()
    if norm.centred:
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + norm.epsilon).sqrt() * norm.weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_after", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_sums_and_norms(dtype: torch.dtype, with_after: bool, centred: bool) -> None:
    hidden, delta = (1 + random(1, 96)).to(dtype), (3 * random(1, 96, seed=1)).to(dtype)
    norm, after = Norm(random(96, seed=2), 0.1, centred), Norm(random(96, seed=3), 0.2, centred)
    rounding = torch.finfo(dtype).eps
    total, x = TorchOperations().add_norm(hidden, delta, after if with_after else None, norm, [])
    added = normed(delta, after).to(dtype).double() if with_after else delta.double()
    assert total.dtype == dtype
    assert (x.codes, x.k) == (None, 96)
    torch.testing.assert_close(total.double(), hidden.double() + added, rtol=rounding, atol=rounding)
    assert x.halves is not None
    torch.testing.assert_close(x.halves.double(), normed(total, norm), rtol=rounding, atol=rounding)
    scaled, x = TorchOperations().add_norm(hidden, delta, after if with_after else None, None, [], scale=0.5)
    assert torch.equal(scaled, total * 0.5)
    assert x.halves is scaled
    total, _ = TorchOperations().add_norm(hidden, None, None, norm, [])
    assert torch.equal(total, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu_squared"])
def test_gates(dtype: torch.dtype, activation: Any) -> None:
    gate, up = (4 * random(1, 640)).to(dtype), random(1, 640, seed=1).to(dtype)
    x = gate.double()
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    share = {"silu": 1 / (1 + (-x).exp()), "gelu_tanh": (1 + inner.tanh()) / 2, "relu_squared": x * (x > 0)}
    for factor in (up, None):
        found = TorchOperations().gate(gate, factor, activation, []).halves
        assert found is not None
        rounding = 2 * torch.finfo(dtype).eps
        expected = x * share[activation] * (1 if factor is None else factor.double())
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


def turned(vectors: Tensor, angles: Tensor, *, neighbours: bool = False) -> Tensor:
    """Complex numbers, whose parts are the halves of each vector, or neighbours, turned by an angle each."""
    pairs = vectors.double()
    one, other = (pairs[..., ::2], pairs[..., 1::2]) if neighbours else pairs.chunk(2, dim=-1)
    result = torch.complex(one, other) * torch.polar(torch.ones_like(angles), angles)
    if neighbours:
        return torch.view_as_real(result).flatten(-2)
    return torch.cat([result.real, result.imag], dim=-1)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("window", "slots"), [(0, 20), (5, 8), (5, 5)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_norms", [False, True])
def test_attention(group: int, window: int, slots: int, softcap: float | None, with_norms: bool) -> None:
    """Token after token, all earlier ones at hand: no slots, no masks."""
    dim, key_heads = 8, 2
    angles = torch.arange(20.0).double()[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.01]).double()
    q_norm, k_norm = (Norm(random(dim, seed=seed), 1e-3) if with_norms else None for seed in (1, 2))
    cosines, sines = angles.cos().float(), angles.sin().float()
    v_norm = Norm(torch.ones(dim), 1e-3) if with_norms and softcap is None else None
    normed_values = v_norm is not None
    heads = Heads(
        *(key_heads * group, key_heads, dim, 0.7, softcap, q_norm, k_norm, cosines, sines),
        values_normed=normed_values,
    )
    cached = Cached(*(torch.zeros(1, key_heads, slots, dim) for _ in range(2)), window)
    keys, values, given, answers = list[Tensor](), list[Tensor](), list[tuple[Tensor, ...]](), list[Tensor]()
    for at in range(20):
        q, k, v = (random(1, count * dim, seed=100 * at + count) for count in (heads.count, key_heads, key_heads))
        given.append((q, k, v))
        found = TorchOperations().attend(q, k, v, heads, cached, torch.tensor([at]), []).halves
        again = TorchOperations().attend(q, None, None, heads, cached, torch.tensor([at]), []).halves
        assert torch.equal(found, again)  # type: ignore[arg-type] -- now with what lies in the cache
        queries, key = q.view(-1, dim), k.view(-1, dim)
        if q_norm is not None and k_norm is not None:
            queries, key = normed(queries, q_norm), normed(key, k_norm)
        queries = turned(queries, angles[at])
        keys.append(turned(key, angles[at]))
        value = v.view(-1, dim)
        values.append(value.double() if v_norm is None else normed(value, v_norm))
        answer = []
        for head in range(heads.count):
            seen = range(max(0, at - window + 1) if window else 0, at + 1)
            scores = torch.stack([queries[head] @ keys[p][head // group] for p in seen]) * 0.7
            weights = (scores if softcap is None else softcap * (scores / softcap).tanh()).exp()
            answer.append(sum(w * values[p][head // group] for w, p in zip(weights, seen, strict=True)))
            answer[-1] = answer[-1] / weights.sum()
        assert found is not None
        answers.append(torch.cat(answer))  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), answers[-1][None], rtol=2e-5, atol=2e-5)
    # And in chunks, of which some are longer than a ring.
    for size in (7, 20):
        parts = Cached(*(torch.zeros(1, key_heads, slots, dim) for _ in range(2)), window)
        for begin in range(0, 20, size):
            q, k, v = (torch.cat(each) for each in zip(*given[begin : begin + size], strict=True))
            at_once = replace(parts, start=begin), torch.arange(begin, begin + len(q))
            found = TorchOperations().attend(q, k, v, heads, *at_once, []).halves
            expected_rows = torch.stack(answers[begin : begin + size])
            torch.testing.assert_close(found.double(), expected_rows, rtol=2e-5, atol=2e-5)  # type: ignore[union-attr]
        torch.testing.assert_close(parts.keys, cached.keys)
        torch.testing.assert_close(parts.values, cached.values)


def test_sinks_take_their_part_of_the_weights() -> None:
    dim, sinks = 8, torch.tensor([-1.0, 0.5, 2.0])
    angles = torch.zeros(3, dim // 2)
    heads = Heads(3, 1, dim, 0.7, None, None, None, angles.cos(), angles.sin(), sinks=sinks)
    cached = Cached(*(torch.zeros(1, 1, 4, dim) for _ in range(2)), 0)
    keys, values = random(3, dim, seed=1), random(3, dim, seed=2)
    for at in range(3):
        q = random(1, 3 * dim, seed=at)
        given = keys[at : at + 1], values[at : at + 1], heads, cached, torch.tensor([at]), list[nn.Module]()
        found = TorchOperations().attend(q, *given).halves
        exponents = (q.view(3, dim).double() @ keys[: at + 1].T.double() * 0.7).exp()
        shares = exponents / (exponents.sum(-1, keepdim=True) + sinks.double().exp()[:, None])
        assert found is not None
        expected = (shares @ values[: at + 1].double()).view(1, -1)
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("part", ["head", "projection", "rotated head"])
def test_heads_are_normed_and_rotated(neighbours: bool, part: Any) -> None:
    """Of one token, whose key is in the cache, and whose value is the answer; of each head six of eight rotate."""
    dim, key_heads, count = 8, 2, 6
    angles = torch.tensor([[0.3, 1.0, 2.0]]).double()
    widths = [count * dim, key_heads * dim] if part == "projection" else [dim, dim]
    q_norm, k_norm = (Norm(random(width, seed=7), 1e-3) for width in widths)
    heads = Heads(
        *(count, key_heads, dim, 1.0, None, q_norm, k_norm, angles.cos().float(), angles.sin().float()),
        normed=part,
        neighbours=neighbours,
    )
    cached = Cached(*(torch.zeros(1, key_heads, 4, dim) for _ in range(2)), 0)
    q, k, v = (random(1, each * dim, seed=each) for each in (count, key_heads, key_heads))
    found = TorchOperations().attend(q, k, v, heads, cached, torch.tensor([0]), []).halves
    assert torch.equal(found, v.view(key_heads, dim).repeat_interleave(count // key_heads, 0).view(1, -1))  # type: ignore[arg-type]

    def rotated(vectors: Tensor) -> Tensor:
        return torch.cat([turned(vectors[:, :6], angles, neighbours=neighbours), vectors[:, 6:].double()], -1)

    if part == "rotated head":
        expected = normed(rotated(k.view(-1, dim)), k_norm)
    else:
        expected = rotated(normed(k if part == "projection" else k.view(-1, dim), k_norm).view(-1, dim))
    torch.testing.assert_close(cached.keys[0, :, 0].double(), expected, rtol=2e-5, atol=2e-5)


def chosen(logits: Tensor, temperature: float = 0.0, softcap: float | None = None) -> int:
    position, token, tokens = torch.tensor([4]), torch.tensor([9]), torch.full((8,), -1)
    choice = TokenChoice(position, token, tokens, torch.tensor([3]), temperature)
    TorchOperations().choose(logits, softcap, choice)
    assert int(position) == 5
    assert tokens.tolist() == [-1] * 5 + [int(token)] + [-1] * 2
    return int(token)


@pytest.mark.parametrize("size", [1, 5, 96, 512, 1024, 1536 + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices(size: int, dtype: torch.dtype) -> None:
    for seed in range(20):
        logits = random(1, size, seed=seed).to(dtype)
        assert chosen(logits) == max(range(size), key=logits[0].tolist().__getitem__)
        noise = gumbel_noise(torch.arange(size), torch.tensor([5]), torch.tensor([3])).double()
        capped = 2 * (logits.double() / 2).tanh()
        assert chosen(logits, 0.7, 2.0) == int((capped[0] / 0.7 + noise).argmax())
        assert chosen(logits, 0.7) == int((logits.double()[0] / 0.7 + noise).argmax())


@pytest.mark.parametrize("size", [5, 1024, 1029])
def test_of_equal_logits_the_first_is_chosen_and_of_no_numbers_some_token(size: int) -> None:
    logits = torch.zeros(1, size)
    assert chosen(logits) == 0
    logits[0, 3:] = 1
    assert chosen(logits) == 3
    logits[0, size - 1] = 2
    assert chosen(logits) == size - 1
    for at in (0, size - 1):
        logits[0, at] = float("nan")
        assert 0 <= chosen(logits) < size
        assert 0 <= chosen(logits, 0.5, 2.0) < size
    assert chosen(torch.full((1, size), float("-inf"))) == 0
