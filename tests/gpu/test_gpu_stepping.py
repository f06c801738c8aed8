"""What lies between a step's products on a GPU, against the same in plain torch and fp64; then whole steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import Tensor, nn

from q6k_kernels import PackedLinear, load_model
from q6k_kernels.cuda import decode
from q6k_kernels.cuda import device as launching
from q6k_kernels.generate import attend_cuda
from q6k_kernels.generate.attend_cuda import HEAD_DIMS
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TokenChoice, TorchOperations
from q6k_kernels.models.layer import NormedPart

pytestmark = pytest.mark.gpu

DENSE = ("arcee", "cohere", "cohere2", "exaone4", "glm4", "gpt-oss", "hunyuan-dense", "olmo2", "olmo3")
GEMMA4 = ("gemma4", "gemma4, experts", "gemma4, experts, gate and up apart", "gemma4, shared keys")
FLIPS = {"gpt-oss": 5}
"""The most of 100 steps in which other experts may be chosen; 3 on an emulated GPU."""
DTYPES = [torch.bfloat16, torch.float16]
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place, of 1."""


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (numbers * scale).to("cuda", dtype)


def norm(k: int, seed: int, *, centred: bool = False) -> Norm:
    return Norm(1 + random(k, dtype=torch.float32, seed=seed, scale=0.2), 1e-5, centred)


def users(k: int) -> list[nn.Module]:
    """A product that wants activations in 8 bits, and one that does not."""
    return [PackedLinear(k, 16, format="q8_0", device="cuda"), nn.Linear(1, 1)]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """One rounding apart, or two where an input of the last was rounded another way."""
    apart = 4 * EPSILON[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=apart, atol=apart / 16)


def assert_quantised(found: Any) -> None:
    """The codes are those of the 16-bit values, as the kernel makes them that products begin with else."""
    assert torch.equal(found.codes, decode._quantize(found.halves, 1, launching.device(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 256, 2560, 4096, 5376, 8192, 12288])
@pytest.mark.parametrize(
    ("with_delta", "with_after", "factor", "centred"),
    [
        (False, False, 1.0, False),
        (True, False, 1.0, True),
        (True, False, 0.22, False),
        (True, True, 1.0, False),
        (True, True, 1.0, True),
    ],
)
def test_sums_and_norms(
    dtype: torch.dtype, k: int, with_delta: bool, with_after: bool, factor: float, centred: bool
) -> None:
    hidden = 1 + random(1, k, dtype=dtype, scale=3.0)
    delta = random(1, k, dtype=dtype, seed=1) if with_delta else None
    after = norm(k, 2, centred=centred) if with_after else None
    both = [
        each.add_norm(hidden, delta, after, norm(k, 3, centred=centred), users(k), factor)
        for each in (kernels(dtype), TorchOperations())
    ]
    (total, found), (expected_total, expected) = both
    assert_close(total, expected_total)
    assert found.halves is not None
    assert expected.halves is not None
    assert_close(found.halves, expected.halves)
    assert_quantised(found)


@pytest.mark.parametrize("k", [256, 5376])
@pytest.mark.parametrize("normed", [True, False])
def test_scaled_sums(k: int, normed: bool) -> None:
    hidden, delta = (random(1, k, dtype=torch.bfloat16, seed=each) for each in (0, 1))
    (total, found), (expected_total, expected) = (
        each.add_norm(hidden, delta, norm(k, 2), norm(k, 3) if normed else None, users(k), scale=0.75)
        for each in (kernels(torch.bfloat16), TorchOperations())
    )
    assert_close(total, expected_total)
    assert found.halves is not None
    assert expected.halves is not None
    assert_close(found.halves, expected.halves)
    assert_quantised(found)


def kernels(dtype: torch.dtype) -> Kernels:
    return Kernels(torch.device("cuda", 0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 256, 14336, 21504])
@pytest.mark.parametrize(
    ("activation", "gated"), [("silu", True), ("gelu_tanh", True), ("relu_squared", True), ("relu_squared", False)]
)
def test_gates(dtype: torch.dtype, k: int, activation: Any, gated: bool) -> None:
    gate, up = random(1, k, dtype=dtype, scale=4.0), random(1, k, dtype=dtype, seed=1) if gated else None
    gate[0, :4] = torch.tensor([0.0, -80.0, 80.0, -11.0])
    found = kernels(dtype).gate(gate, up, activation, users(k))
    expected = TorchOperations().gate(gate, up, activation, []).halves
    assert found.halves is not None
    assert expected is not None
    assert_close(found.halves, expected)
    assert_quantised(found)


def attention(
    dtype: torch.dtype,
    dim: int,
    group: int,
    slots: int,
    window: int,
    position: int,
    normed: bool,
    softcap: float | None,
    growth: bool = False,
    values: Literal["projected", "normed", "keys", "of another layer"] = "projected",
    part: NormedPart = "head",
    neighbours: bool = False,
    rotated: int | None = None,
    sinks: bool = False,
) -> None:
    key_heads = 2
    cosines, sines = (random(4096, (rotated or dim) // 2, dtype=torch.float32, seed=each) for each in (1, 2))
    of_q, of_k = (key_heads * group * dim, key_heads * dim) if part == "projection" else (dim, dim)
    heads = Heads(
        count=key_heads * group,
        key_heads=key_heads,
        dim=dim,
        scale=dim**-0.5,
        softcap=softcap,
        q_norm=norm(of_q, 3) if normed else None,
        k_norm=norm(of_k, 4) if normed else None,
        cosines=cosines,
        sines=sines,
        growth=random(4096, dtype=torch.float32, seed=6).abs() if growth else None,
        values_normed=values != "projected",
        normed=part,
        neighbours=neighbours,
        sinks=random(key_heads * group, dtype=torch.float32, seed=9) if sinks else None,
    )
    k = heads.count * dim
    q = random(1, heads.count * dim, dtype=dtype)
    key, value = (random(1, key_heads * dim, dtype=dtype, seed=each) for each in (7, 8))
    cache = [random(1, key_heads, slots, dim, dtype=dtype, seed=each) for each in (5, 6)]
    # What no position has been written to must not be looked at.
    written = min(position, slots)
    for each in cache:
        each[:, :, written:] = float("nan")
    # The oracle's must not: it multiplies them with 0.
    oracle = [torch.nan_to_num(each) for each in cache]
    at = torch.tensor([position], device="cuda")
    run = kernels(dtype)
    run.reserve(heads)
    mine, theirs = (Cached(each[0], each[1], window) for each in (cache, oracle))
    own: tuple[Any, Any] = (key, key if values == "keys" else value)
    if values == "of another layer":  # whose launch comes first
        run.attend(q, *own, heads, mine, at, users(k))
    for _ in range(2):  # and what the first leaves behind must not matter to the second
        found = run.attend(q, *((None, None) if values == "of another layer" else own), heads, mine, at, users(k))
    expected = TorchOperations().attend(q, *own, heads, theirs, at, []).halves
    assert found.halves is not None
    assert expected is not None
    torch.testing.assert_close(
        found.halves.double(), expected.double(), rtol=4 * EPSILON[dtype], atol=4 * EPSILON[dtype]
    )
    assert_quantised(found)
    for filled, wanted in zip(cache, oracle, strict=True):
        assert_close(torch.nan_to_num(filled), wanted)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12])
def test_attention_of_all_shapes(dim: int, group: int) -> None:
    attention(torch.bfloat16, dim, group, 520, 0, 300, False, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 15, 16, 63, 64, 127, 128, 1000, 2043, 4095])
def test_attention_at_all_positions(dtype: torch.dtype, position: int) -> None:
    attention(dtype, 128, 4, 4096, 0, position, True, None)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_of_queries_that_grow_with_their_position(softcap: float | None) -> None:
    attention(torch.bfloat16, 128, 4, 4096, 0, 1000, False, softcap, growth=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["normed", "keys", "of another layer"])
@pytest.mark.parametrize(("dim", "group", "window"), [(64, 3, 40), (256, 2, 40), (512, 8, 0), (512, 12, 0)])
def test_attention_with_norms_of_values(dtype: torch.dtype, values: Any, dim: int, group: int, window: int) -> None:
    for position in (0, 39, 300):
        slots = 104 if window else 520
        attention(dtype, dim, group, slots, window, position, True, None, values=values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["head", "projection", "rotated head"])
@pytest.mark.parametrize(
    ("dim", "group", "neighbours", "rotated", "sinks"),
    [(64, 8, False, 64, True), (128, 1, True, 128, False), (128, 5, True, 64, True), (96, 12, False, 64, True)],
)
def test_attention_of_heads_of_other_forms(
    dtype: torch.dtype, part: NormedPart, dim: int, group: int, neighbours: bool, rotated: int, sinks: bool
) -> None:
    for position, window in ((0, 0), (300, 0), (300, 40)):
        given = dtype, dim, group, 104 if window else 520, window, position, True, None
        attention(*given, part=part, neighbours=neighbours, rotated=rotated, sinks=sinks)


@pytest.mark.parametrize("position", [127, 128, 255, 256, 300, 1000, 4095])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_attention_where_warps_take_turns(position: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_cuda, "MOST_BLOCKS", blocks)
    attention(torch.bfloat16, 128, 4, 4096, 0, position, True, None)


@pytest.mark.parametrize("position", [0, 30, 39, 40, 103, 104, 105, 150, 1000, 3001])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_in_a_window(position: int, softcap: float | None) -> None:
    attention(torch.bfloat16, 64, 4, 104, 40, position, False, softcap)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_attention_where_a_block_has_less_shared_memory(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_cuda, "ATTEND_WARPS", (4,))
    for group in (4, 8):  # the vectors of eight heads take a warp three turns
        attention(torch.bfloat16, dim, group, 520, 0, 300, True, None)


def test_attention_is_the_same_every_time() -> None:
    """Whichever block comes last."""
    heads = Heads(
        32, 8, 128, 0.1, None, None, None, *(random(4096, 64, dtype=torch.float32, seed=each) for each in (1, 2))
    )
    run = kernels(torch.bfloat16)
    run.reserve(heads)
    cached = Cached(*(random(1, 8, 4096, 128, dtype=torch.bfloat16, seed=each) for each in (3, 4)), 0)
    q, k, v = (random(1, n * 128, dtype=torch.bfloat16) for n in (32, 8, 8))
    at = torch.tensor([3000], device="cuda")
    results = [run.attend(q, k, v, heads, cached, at, users(4096)).halves for _ in range(50)]
    assert all(torch.equal(each, results[0]) for each in results)
    assert not run._counters.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 5, 500, 128256, 262144])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_choices(dtype: torch.dtype, vocabulary: int, temperature: float, softcap: float | None) -> None:
    """Many of the logits are alike, in 16 bits: of the best the first."""
    run = kernels(dtype)
    for seed in range(20):
        logits = random(1, vocabulary, dtype=dtype, seed=seed).clamp(max=2.0)
        if seed == 3:
            logits[:, vocabulary // 2 :] = float("nan")
        results = []
        for operations in (run, TorchOperations()):
            position, token, start = (torch.tensor([each], device="cuda") for each in (40 + seed, 9, seed))
            chosen = torch.zeros(100, dtype=torch.int64, device="cuda")
            operations.choose(logits, softcap, TokenChoice(position, token, chosen, start, temperature))
            assert int(chosen[41 + seed]) == int(token)
            assert int(chosen.count_nonzero()) == int(token != 0)
            results.append((int(position), int(token)))
        if seed == 3:  # what counts is that it is a token
            assert 0 <= results[0][1] < vocabulary
        else:
            assert results[0] == results[1] == (41 + seed, results[0][1])
    assert not run._counted.any()


def models() -> dict[str, Any]:
    pytest.importorskip("libgguf")
    import dense_cases
    from model_cases import MODELS

    names = ("llama 3.1", "mistral as llama", "mistral3", "qwen2", "qwen3", "gemma2", "gemma3", *GEMMA4)
    return {name: MODELS[name] for name in names} | {name: dense_cases.DENSE[name] for name in DENSE}


@pytest.mark.parametrize(
    "name", ["llama 3.1", "mistral as llama", "qwen2", "qwen3", "gemma2", "gemma3", *DENSE, *GEMMA4]
)
@pytest.mark.parametrize("activations", ["auto", "bf16"])
def test_whole_steps(name: str, activations: Any, tmp_path: Path) -> None:
    """Logits against those of the same step in plain torch; the graph's tokens against those of single steps.

    A rounding apart can be a step of 8 bits apart. With 8 bits both results are off by what those change, and by up
    to twice as much from each other: far more where scores are not scaled down (Gemma 4). Where a rounding makes a
    router choose another expert there is no bound, so a few steps of a mixture without norms may be further apart.
    """
    out, _ = models()[name].bundle(tmp_path)
    model, unquantised = (
        load_model(out, device="cuda", dtype=torch.float16, activations=each) for each in (activations, "bf16")
    )
    prompt = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    generator = Generator(model, capacity=150)
    assert generator.fused
    generator.prefill(prompt)
    reference, exact = (Step(each, generator.cache, TorchOperations()) for each in (model, unquantised))
    tokens, apart, noise = [int(generator._token)], [0.0], [0.06]
    for _ in range(100):
        step = generator._fused_step
        assert step is not None
        right = exact(generator._token)
        expected = reference(generator._token)
        logits = step(generator._token)  # last, so that the cache has its keys
        noise.append(float((expected - right).abs().max() / right.std()))
        apart.append(float((logits - expected).abs().max() / expected.std()))
        generator._choose(logits)  # in torch
        tokens.append(int(generator._token))
    assert sorted(apart)[-1 - FLIPS.get(name, 0)] < 2 * max(noise)
    generator.reset()
    generator.prefill(prompt)
    assert list(generator.generate(101)) == tokens


@pytest.mark.parametrize("name", ["llama 3.1", "gemma3"])
def test_steps_of_mixed_weights(name: str, tmp_path: Path) -> None:
    """Some projections packed, some not: what is common to both is there in both forms."""
    from tiny_models import F16, Q3_K

    types = {"blk.0.attn_v*": Q3_K, "blk.1.ffn_up*": F16, "blk.0.attn_output*": F16, "blk.1.ffn_down*": Q3_K}
    out, _ = replace(models()[name], types=types).bundle(tmp_path)
    model = load_model(out, device="cuda", dtype=torch.float16)
    generator = Generator(model, capacity=100)
    generator.prefill([5, 6, 7])
    logits = generator._fused_step(generator._token)  # type: ignore[misc]
    expected = Step(model, generator.cache, TorchOperations())(generator._token)
    assert float((logits - expected).abs().max() / expected.std()) < 0.05
