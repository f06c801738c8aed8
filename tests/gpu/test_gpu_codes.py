"""Keys and values of 8 bits on a GPU: steps against plain torch, and what is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import Tensor, nn

from families import tiny
from q6k_kernels.generate.cache_codes import coded
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Cached, Heads
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "slots"), [(64, 4104), (96, 520), (128, 520), (128, 8192), (256, 8192), (512, 520)]
)
def test_steps(dtype: torch.dtype, dim: int, slots: int) -> None:
    """With few slots and with many, for which blocks have more warps."""
    angles = [random(slots, dim // 2, seed=seed).to(CUDA) for seed in (1, 2)]
    heads = Heads(8, 2, dim, dim**-0.5, None, None, None, *angles)
    run = Kernels(CUDA, dtype)
    run.reserve(heads)
    q, k, v = (random(1, count * dim, seed=count).to(CUDA, dtype) for count in (8, 2, 2))
    for position in (0, 300, slots - 1):
        both = [coded(3 * random(1, 2, slots, dim, seed=seed)) for seed in (5, 6)]
        (keys, of_keys), (values, of_values) = [[each.to(CUDA) for each in pair] for pair in both]
        mine = Cached(keys, values, 0, scales=(of_keys, of_values))
        theirs = Cached(keys.clone(), values.clone(), 0, scales=(of_keys.clone(), of_values.clone()))
        at = torch.tensor([position], device=CUDA)
        found = run.attend(q, k, v, heads, mine, at, [nn.Identity()]).halves
        expected = TorchOperations().attend(q, k, v, heads, theirs, at, []).halves
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
        assert (mine.keys.int() - theirs.keys.int()).abs().max() <= 1
        assert (mine.values.int() - theirs.values.int()).abs().max() <= 1


def test_a_generator_refuses_what_has_no_kernels() -> None:
    """A network of 48 values; the remedy is a plain cache."""
    from q6k_kernels.errors import UnsupportedModelError

    model = tiny.__wrapped__("llama").to(CUDA, torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="an intermediate size of 48") as failure:
        Generator(model, capacity=90, cache_type="int8")
    assert "--cache" in str(failure.value.remedy)
