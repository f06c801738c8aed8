"""Gated delta nets, gated attention and mixtures on a GPU, against plain torch; then whole models of Qwen 3.5."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import Tensor, nn

import any_type
from q6k_kernels import PackedLinear, PackedWeight, load_model
from q6k_kernels.cuda import decode
from q6k_kernels.cuda import device as launching
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixture
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.weights.experts import PackedExperts

pytestmark = pytest.mark.gpu

DIM = 128
DTYPES = [torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (numbers * scale).to("cuda", dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """A few roundings to 16 bits apart."""
    apart = 8 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=apart, atol=apart / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("key_heads", "value_heads", "tiled"), [(1, 1, False), (2, 6, True), (16, 32, True), (16, 48, True)]
)
def test_gated_delta_nets(dtype: torch.dtype, key_heads: int, value_heads: int, tiled: bool) -> None:
    channels, values = (2 * key_heads + value_heads) * DIM, value_heads * DIM
    heads = DeltaHeads(
        key_heads,
        value_heads,
        DIM,
        DIM,
        convolution=random(channels, 4, scale=0.5),
        decays=-random(value_heads).abs(),
        biases=random(value_heads, seed=1),
        norm=1 + random(DIM, scale=0.2),
        epsilon=1e-6,
        tiled=tiled,
    )
    run = Kernels(torch.device("cuda", 0), dtype)
    run.reserve(heads)
    packed = PackedLinear(values, 16, device="cuda") if values % 256 == 0 else nn.Identity()
    states = [(random(1, channels, 4, dtype=dtype), random(1, value_heads, DIM, DIM)) for _ in "ab"]
    for token in range(6):
        sizes = ((channels, 1.0), (values, 2.0), (value_heads, 2.0), (value_heads, 15.0))
        mixed, z, b, a = (random(1, size, dtype=dtype, seed=token, scale=by) for size, by in sizes)
        found = run.delta(mixed, z, b, a, heads, states[0], [packed, nn.Identity()])
        expected = TorchOperations().delta(mixed, z, b, a, heads, states[1], []).halves
        assert found.halves is not None
        assert expected is not None
        assert_near(found.halves, expected)
        assert torch.equal(states[0][0], states[1][0])
        torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-3, atol=2e-3)
        if found.codes is not None:
            assert torch.equal(found.codes, decode._quantize(found.halves, 1, launching.device(0)))
        assert not run._counters.any()
        states[0][1].copy_(states[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [64, 256])
@pytest.mark.parametrize(("group", "position"), [(6, 0), (6, 700), (8, 33)])
def test_gated_attention_that_rotates_a_part(dtype: torch.dtype, rotated: int, group: int, position: int) -> None:
    dim, key_heads, slots = 256, 2, 1024
    angles = random(slots, rotated // 2)
    norms = [Norm(1 + random(dim, seed=seed, scale=0.2), 1e-6) for seed in (3, 4)]
    heads = Heads(
        key_heads * group, key_heads, dim, dim**-0.5, None, *norms, angles.cos(), angles.sin(), gated=True
    )
    run = Kernels(torch.device("cuda", 0), dtype)
    run.reserve(heads)
    q = random(1, heads.count * 2 * dim, dtype=dtype)
    key, value = (random(1, key_heads * dim, dtype=dtype, seed=seed) for seed in (7, 8))
    caches = [[random(1, key_heads, slots, dim, dtype=dtype, seed=seed) for seed in (5, 6)] for _ in "ab"]
    at = torch.tensor([position], device="cuda")
    user: list[nn.Module] = [PackedLinear(heads.count * dim, 16, device="cuda"), nn.Identity()]
    found = run.attend(q, key, value, heads, Cached(*caches[0], 0), at, user)
    expected = TorchOperations().attend(q, key, value, heads, Cached(*caches[1], 0), at, []).halves
    assert found.halves is not None
    assert expected is not None
    assert_near(found.halves, expected)
    assert_near(caches[0][0], caches[1][0])
    assert torch.equal(found.codes, decode._quantize(found.halves, 1, launching.device(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "top", "hidden", "between"), [(256, 8, 2048, 512), (37, 5, 2304, 256)])
def test_mixtures_of_experts(dtype: torch.dtype, count: int, top: int, hidden: int, between: int) -> None:
    def stack(n: int, k: int) -> PackedWeight:
        row = weight_type("q4_0")
        tiles = [layout.pack(any_type.planes(row, n, k), row).cuda() for _ in range(2)]
        return PackedWeight(torch.stack([tiles[each % 2] for each in range(count)]), (count, n, k), row.name)

    experts = PackedExperts([stack(2 * between, hidden)], stack(hidden, between), "silu")
    mixture = Mixture(random(count + 1, hidden, dtype=dtype, scale=0.1), experts, count, top)
    run = Kernels(torch.device("cuda", 0), dtype)
    assert run.supports_mixture(mixture) == ""
    x, shared = random(1, hidden, dtype=dtype), random(1, hidden, dtype=dtype, seed=1)
    with torch.no_grad():
        found, expected = (
            each.mix(x, mixture, *each.route(x, mixture), shared).sum() for each in (run, TorchOperations())
        )
    # Activations of products are in 8 bits, and those of down are rounded once, not twice.
    assert float((found - expected).float().norm()) < 0.02 * float(expected.float().norm())


@pytest.fixture(scope="module", params=["dense", "mixture"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that the kernels support: heads of 128 of the delta nets."""
    from tiny_qwen35 import QWEN35, QWEN35_MOE

    tiny = QWEN35 if request.param == "dense" else QWEN35_MOE
    sizes = tiny.config | {
        "linear_key_head_dim": DIM,
        "linear_value_head_dim": DIM,
        "linear_num_value_heads": 4,
        "head_dim": 128,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    out, _ = replace(tiny, config=sizes).bundle(tmp_path_factory.mktemp("qwen35"))
    return Path(out)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Any:
    return load_model(bundle, device="cuda")


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_replayed_steps_choose_what_eager_ones_do(model: Any) -> None:
    """So recording, which runs steps and undoes them, leaves the states as they were."""
    generator = Generator(model, capacity=400)
    assert generator.fused
    generator.prefill(text(70))
    replayed = list(generator.generate(100))
    eager = Generator(model, capacity=400)
    eager.prefill(text(70))
    chosen = [int(eager._token)]
    for _ in range(99):
        eager.step(eager.cache.slots)
        chosen.append(int(eager._token))
    assert replayed == chosen


def test_steps_in_vain_leave_no_trace(model: Any) -> None:
    generator = Generator(model, capacity=600)
    generator.prefill(text(50))
    tokens = generator.generate(300)
    answer = [next(tokens) for _ in range(90)]
    tokens.close()
    found = generator.prefill(text(9, seed=1))
    whole = Generator(model, capacity=600).prefill(text(50) + answer + text(9, seed=1))
    assert float((found - whole).abs().max() / whole.std()) < 0.1


def test_the_steps_logits_are_those_of_transformers(bundle: Path) -> None:
    """Without activations in 8 bits, which only the step would have."""
    model = load_model(bundle, device="cuda", dtype=torch.float16, activations="bf16")
    ids = text(60)
    generator = Generator(model, capacity=100)
    generator.prefill(ids[:40])
    step, position = generator._fused_step, generator.cache.position
    assert step is not None
    found = []
    for token in ids[40:]:
        found.append(step(torch.tensor([token], device="cuda"))[0])
        position += 1
    with torch.no_grad():
        expected = model(torch.tensor([ids], device="cuda")).logits[0, 40:].float()
    assert float((torch.stack(found) - expected).abs().max() / expected.std()) < 0.1
