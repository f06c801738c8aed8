"""The kernel of gated delta nets on the emulated GPU, against the same in plain torch, token after token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import nn

from cuda_emulator.memory import Memory, emulate
from q6k_kernels import PackedLinear
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = cuda_emulator.requires_compiler
DIM, KEY_HEADS, VALUE_HEADS = 128, 3, 9  # whose values do not fill a super-block
CHANNELS, VALUES = (2 * KEY_HEADS + VALUE_HEADS) * DIM, VALUE_HEADS * DIM
TOKENS = 6  # more than the convolution sees


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield memory
    memory.check()


def heads(tiled: bool) -> DeltaHeads:
    random = torch.Generator().manual_seed(0)
    return DeltaHeads(
        KEY_HEADS,
        VALUE_HEADS,
        DIM,
        DIM,
        convolution=torch.randn(CHANNELS, 4, generator=random),
        decays=-torch.rand(VALUE_HEADS, generator=random) * 2,
        biases=torch.randn(VALUE_HEADS, generator=random),
        norm=torch.rand(DIM, generator=random) + 0.5,
        epsilon=1e-6,
        tiled=tiled,
    )


def test_outputs_and_states_are_those_of_torch(gpu: Memory) -> None:
    dtype, net, random = torch.bfloat16, heads(tiled=True), torch.Generator().manual_seed(1)
    kernels = Kernels(torch.device("cpu", 0), dtype)
    assert kernels.supports(256, 256, net) == ""
    kernels.reserve(net)
    users: list[nn.Module] = [PackedLinear(VALUES, 16, format="q8_0"), nn.Identity()]
    states = [
        (torch.zeros(1, CHANNELS, 4, dtype=dtype), torch.randn(1, VALUE_HEADS, DIM, DIM, generator=random))
        for _ in "ab"
    ]
    states[1][1].copy_(states[0][1])
    for token in range(TOKENS):
        # 20 and more take the other branch of softplus.
        sizes = {"mixed": (CHANNELS, 1.0), "z": (VALUES, 2.0), "b": (VALUE_HEADS, 2.0), "a": (VALUE_HEADS, 15.0)}
        inputs = [(torch.randn(1, size, generator=random) * spread).to(dtype) for size, spread in sizes.values()]
        found = kernels.delta(*inputs, net, states[0], users)
        expected = TorchOperations().delta(*inputs, net, states[1], users)
        assert torch.equal(states[0][0], states[1][0]), token
        torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-3, atol=2e-3)
        assert found.halves is not None
        assert found.codes is not None
        assert expected.halves is not None
        difference = (found.halves.double() - expected.halves.double()).abs()
        assert float(difference.max()) < 8 * torch.finfo(dtype).eps * float(expected.halves.abs().max())
        again = decode._quantize(found.halves, 1, kernels._device)
        assert torch.equal(found.codes, again)
        assert not kernels._counters.any()
        states[0][1].copy_(states[1][1])
