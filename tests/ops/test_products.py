"""Products with weights of a byte each, against fp64: on both paths of the compiled code, in every weight type."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import any_type

torch = pytest.importorskip("torch")

from torch import Tensor

from q6k_kernels.errors import PackageMissingError
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from q6k_kernels.ops import accuracy, products
from q6k_kernels.weights.byte_layers import ByteEmbedding, bytes_of
from q6k_kernels.weights.weight import PackedWeight

ROOT = Path(__file__).parents[2]
N, K = 37, 768
PATHS = list(dict.fromkeys((False, products.has_fast())))
ROWS = list(WEIGHT_TYPES.values())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(row: WeightType, n: int = N, k: int = K) -> tuple[PackedWeight, accuracy.Weight]:
    planes = any_type.planes(row, n, k)
    return PackedWeight.from_planes(planes, row.name), accuracy.of_planes(planes, row)


def rows(m: int, dtype: torch.dtype = torch.float32, k: int = K) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def assert_right(found: Tensor, x: Tensor, weight: accuracy.Weight, bias: Tensor | None) -> None:
    """Check products of float32.

    A term meets a product with the code, 4 additions in a group, a product with the scale, an addition for each
    group and 3 for the lanes at most; or, of mins, 7 additions for a sum, a product, and fewer additions than that.
    Then come a subtraction and the bias. Products by torch add K terms, of weights that round once.
    """
    n, groups = weight.scale.shape
    k, wide = x.shape[1], x.double()
    scale = weight.scale.repeat_interleave(k // groups, 1)
    terms = [weight.codes.double() * scale]
    if weight.min is not None:
        terms.append(-weight.min.repeat_interleave(k // groups, 1))
    exact = sum(wide @ term.T for term in terms)
    magnitude = sum(wide.abs() @ term.abs().T for term in terms)
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    roundings = k + 3 if len(x) > products.FEW_ROWS else groups + 13
    assert found.shape == (len(x), n)
    assert bool(((found.double() - exact).abs() <= roundings * 2**-24 * 1.001 * magnitude).all())


@pytest.mark.parametrize("fast", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=list(WEIGHT_TYPES))
def test_products_are_right(row: WeightType, fast: bool) -> None:
    weight, exact = packed(row)
    held = bytes_of(weight)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1))
    for m in (1, 3, products.FEW_ROWS + 2):
        for each in (None, bias):
            assert_right(products.linear(rows(m), held, each, fast=fast), rows(m), exact, each)
    assert torch.equal(products.expand(held, fast=fast), weight.dequantize(torch.float32))


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_paths_and_threads_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ALONE", 0)
    held = bytes_of(packed(WEIGHT_TYPES[name], 131, 1024)[0])
    x = rows(2, k=1024)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found += [products.linear(x, held, fast=fast) for fast in PATHS]
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_arm_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"{compiler} and {emulator} are not both on PATH")
    extensions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    extension = next(each for each in extensions if each["name"] == "q6k_kernels.ops._products")
    include = ROOT / Path(*extension["sources"]).parent
    flags = [*extension["extra-compile-args"], "-static", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
    program = tmp_path / "products_main"
    source = ROOT / "tests" / "support" / "products_main.c"
    subprocess.run([compiler, *flags, "-o", program, source], check=True)
    held = bytes_of(packed(WEIGHT_TYPES[name])[0])
    least = torch.zeros_like(held.scale) if held.least is None else held.least
    held, x = products.Bytes(held.codes, held.scale, least), rows(3)
    group = K // held.scale.shape[1]
    given = b"".join(each.numpy().tobytes() for each in (held.codes, held.scale, least, x))
    command = [emulator, program, *map(str, (N, K, group, len(x)))]
    found = subprocess.run(command, input=given, capture_output=True, check=True).stdout
    assert found == b"".join(each.numpy().tobytes() for each in (products.linear(x, held), products.expand(held)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype: torch.dtype) -> None:
    held = bytes_of(packed(WEIGHT_TYPES["q5_k"])[0])
    x = rows(6, dtype).view(2, 3, K)
    assert torch.equal(products.linear(x, held), products.linear(x.float(), held).to(dtype))
    assert products.linear(x[:0], held).shape == (0, 3, N)


@pytest.mark.parametrize("name", ["q4_1", "q6_k_exact", "mxfp4"])
def test_rows_are_the_weights_to_the_bit(name: str) -> None:
    weight, _ = packed(WEIGHT_TYPES[name])
    at = torch.tensor([[3, 0], [N - 1, 3]])
    layer = ByteEmbedding(bytes_of(weight), torch.bfloat16, None)
    assert torch.equal(layer(at), weight.dequantize(torch.bfloat16)[at])
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))


def test_what_cannot_be_multiplied_is_refused() -> None:
    held = bytes_of(packed(WEIGHT_TYPES["q4_k"])[0])
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 768\) on the CPU, found \(1, 512\)"):
        products.linear(rows(1, k=512), held)
    with pytest.raises(ValueError, match="x requires a gradient"):
        products.linear(rows(1).requires_grad_(), held)
    with pytest.raises(ValueError, match=r"expected torch.float32 on the CPU, found torch.bfloat16"):
        products.linear(rows(1), replace(held, scale=held.scale.bfloat16()))


def test_missing_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_EXTENSION", "q6k_kernels.ops._not_built")
    assert not products.installed()
    with pytest.raises(PackageMissingError, match="compiled products q6k_kernels.ops._not_built are not installed"):
        products.check_installed()
