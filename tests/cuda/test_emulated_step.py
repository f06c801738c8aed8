"""A step's kernels of norms and gates, and whole steps, on the emulated GPU, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from cuda_emulator.memory import emulate
from q6k_kernels import PackedLinear, load_model
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import ProductInput, TorchOperations
from q6k_kernels.models.layer import Activation

pytestmark = cuda_emulator.requires_compiler


def users(k: int) -> list[nn.Module]:
    """A product that wants activations in 8 bits, and one that does not."""
    return [PackedLinear(k, 16, format="q8_0"), nn.Identity()]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.dtype], Kernels]]:
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype)
    memory.check()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(found: Tensor | None, expected: Tensor | None) -> None:
    """Two roundings apart at most."""
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.double(), expected.double(), rtol=2.0**-7, atol=2.0**-11)


def assert_quantised(found: ProductInput) -> None:
    """The codes are those of the 16-bit values, with zeros up to the end of a super-block."""
    assert found.halves is not None
    assert found.codes is not None
    assert torch.equal(found.codes, decode._quantize(found.halves, 1, device_like(90)))


@pytest.mark.parametrize("k", [96, 12288])
@pytest.mark.parametrize("centred", [False, True])
def test_sums_and_norms(make: Callable[[torch.dtype], Kernels], k: int, centred: bool) -> None:
    """Of values whose mean is not 0, in rows that do not fill a warp and in the longest."""
    hidden, delta = 3 + random(1, k).bfloat16(), random(1, k, seed=1).bfloat16()
    norms = [Norm(1 + random(k, seed=seed) / 4, 0.1, centred) for seed in (2, 3)]
    run = make(torch.bfloat16)
    for given in ((hidden, delta, *norms), (hidden, delta, None, norms[1]), (hidden, delta, norms[0], None)):
        (total, found), (expected_total, expected) = (
            each.add_norm(*given, users(k)) for each in (run, TorchOperations())
        )
        assert_close(total, expected_total)
        assert_close(found.halves, expected.halves)
        assert_quantised(found)
    # Of no use to a product, the sum is all there is.
    total, nothing = run.add_norm(hidden, delta, None, None, [])
    assert_close(total, hidden + delta)
    assert (nothing.halves, nothing.codes) == (None, None)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu_squared"])
@pytest.mark.parametrize("gated", [True, False])
def test_gates(make: Callable[[torch.dtype], Kernels], activation: Activation, gated: bool) -> None:
    gate, up = 4 * random(1, 96), random(1, 96, seed=1) if gated else None
    gate[0, :4] = torch.tensor([0.0, -80.0, 80.0, -11.0])
    given = gate.bfloat16(), None if up is None else up.bfloat16(), activation
    found, expected = (each.gate(*given, users(96)) for each in (make(torch.bfloat16), TorchOperations()))
    assert_close(found.halves, expected.halves)
    assert_quantised(found)


@pytest.mark.parametrize("name", ["cohere2", "olmo3"])
def test_whole_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network beside attention, and of norms after each part and of projections; both with windows."""
    pytest.importorskip("libgguf")
    from dense_cases import DENSE

    out, _ = DENSE[name].bundle(tmp_path)
    model = load_model(out, dtype=torch.bfloat16, activations="bf16")
    generator = Generator(model, capacity=40, fused=True)
    generator.prefill(torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(0)).tolist())
    memory = emulate(monkeypatch, device_like(90))
    reference = Step(model, generator.cache, TorchOperations())
    step = Step(model, generator.cache, Kernels(torch.device("cpu", 0), torch.bfloat16))
    expected = reference(generator._token)
    found = step(generator._token)
    memory.check()
    assert (found - expected).abs().max() < 0.1 * expected.std()
