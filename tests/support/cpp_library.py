"""Build the C++ library once with the few kernels that tests launch, and call its functions through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from q6k_convert.machine import build_ops
from q6k_kernels.cpp import cubins, units
from q6k_kernels.cuda import decode, decode_plan, gemm_mma, gemm_wgmma
from q6k_kernels.cuda import device as launching
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from q6k_kernels.jit import compiler, cubin_cache

PACKAGE = Path(compiler.__file__).parents[1]
H200 = launching.Device(0, 90, 132, 227 << 10, 228 << 10)
A100 = launching.Device(0, 80, 108, 163 << 10, 164 << 10)
DECODE, WGMMA, MMA = 0, 1, 2
KEPT_SECONDS = 7 * 86400
WARNINGS = "-Werror"
"""Flags of the compiler: a warning fails the tests, never a user's build."""


@dataclass(frozen=True)
class Product:
    """A product that both Python and the library launch."""

    kind: int
    m: int
    n: int
    k: int
    format: str
    fp16: bool

    @property
    def row(self) -> WeightType:
        """Row of the weight type."""
        return WEIGHT_TYPES[self.format]

    @property
    def device(self) -> launching.Device:
        """GPU that has the kernel."""
        return A100 if self.kind == MMA else H200


Q6_K, EXACT, Q4_K, Q8_0 = "q6_k", "q6_k_exact", "q4_k", "q8_0"
PRODUCTS = [
    *(
        Product(DECODE, m, 4096, 4096, format, False)
        for m, format in itertools.product((1, 2, 4, 8), (Q6_K, EXACT))
    ),
    *(Product(DECODE, *size, True) for size in ((1, 133, 768, EXACT), (3, 133, 768, Q6_K), (17, 37, 512, EXACT))),
    *(Product(DECODE, m, 5376, 21504, Q6_K, False) for m in (1, 8)),
    *(Product(DECODE, m, 2560, 9728, Q4_K, False) for m in (1, 8)),
    *(Product(WGMMA, m, 4096, 4096, Q6_K, False) for m in (9, 64, 512)),
    *(Product(WGMMA, *size, True) for size in ((9, 1001, 2560, EXACT), (300, 133, 768, Q6_K))),
    *(Product(MMA, m, 150, 4096, format, format == EXACT) for m, format in ((9, EXACT), (64, Q6_K), (300, Q6_K))),
    *(
        Product(kind, 1 if kind == DECODE else 9, 133, 800 if row.block == 32 else 768, row.name, False)
        for kind, row in itertools.product((DECODE, WGMMA, MMA), WEIGHT_TYPES.values())
    ),
]


def _kernels(product: Product) -> Iterator[launching.Variant]:
    """Yield the kernels that Python launches for the product."""
    m, n, k, row, fp16 = product.m, product.n, product.k, product.row, product.fp16
    device = product.device
    if product.kind == WGMMA:
        yield gemm_wgmma._variant(gemm_wgmma.plan(m, n, k, device).config, row, fp16)
    elif product.kind == MMA:
        plan = gemm_mma.plan(m, n, k, row, device)
        yield gemm_mma._variant((plan.tokens, plan.parts), plan.slots, row, fp16)
    else:
        for rows in {min(m, 8), (m - 1) % 8 + 1}:
            chosen = decode_plan.plan(rows, n, k, row, device)
            while chosen is None:
                rows //= 2
                chosen = decode_plan.plan(rows, n, k, row, device)
            yield decode._variant(chosen.kernel, chosen.cluster > 1, row, fp16)
            if not chosen.fused:
                yield decode._quantize_variant(chosen.tokens, fp16)


def named_cubin(kernels: Iterable[str]) -> bytes:
    """Return what the stand-in driver takes for code: it reads nothing but the kernels' names."""
    return b"\x7fELF" + b"".join(b".text.%s\0" % name.encode() for name in kernels).ljust(4096, b"\0")


@cache
def library() -> Path:
    """Return the library with the kernels of PRODUCTS, built unless one of the same sources exists.

    The first product's are compiled. Of the others only the names are there, because no GPU will run them here and
    `compile_kernels.py` compiles every file, weight type and value of a macro.
    """
    if missing := [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} not on PATH")
    import torch

    each = [{(p.device.arch, file, macros) for file, _, macros in _kernels(p)} for p in PRODUCTS]
    names = sorted(map(units.name_of, set().union(*each)))
    compiled = cubins._compile

    def compile_first(unit: units.Unit, wanted: Sequence[str], dynamic: Any) -> cubins.Built:
        if unit in each[0]:
            return compiled(unit, wanted, dynamic)
        return cubins.Built(unit, named_cubin(wanted), [], [], "")

    only = f"^({'|'.join(names)})$"
    digest = hashlib.sha256(f"{only} {torch.__version__} {build_ops.find_tools()}".encode())
    patterns = ("cuda/*.*", "cpp/*.*", "cpp/src/*", "jit/*.py", "formats/t*.py")
    for path in sorted(path for pattern in patterns for path in PACKAGE.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    kept = cubin_cache.directory() / "tests"
    folder = kept / digest.hexdigest()[:16]
    if not folder.exists():
        kept.mkdir(parents=True, exist_ok=True)
        for old in kept.iterdir():  # remove builds of earlier sources that nobody uses
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=kept, ignore_cleanup_errors=True) as made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CXXFLAGS", WARNINGS)
                patch.setattr(cubins, "_compile", compile_first)
                build_ops.build(Path(made), [80, 90], None, print, only)
            with contextlib.suppress(OSError):  # another process was faster
                Path(made).rename(folder)
    return folder / build_ops.LIBRARY


class Functions:
    """Functions that the library exports; loading it registers its operations."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.q6k_ops_slice_rows.restype = ctypes.c_int64
        self._size = ctypes.c_int64

    def _device(self, device: launching.Device) -> Any:
        return (self._size * 5)(
            device.index,
            device.arch,
            device.multiprocessors,
            device.shared_bytes,
            device.multiprocessor_shared_bytes,
        )

    def _plan(self, function: Any, sizes: tuple[Any, ...], device: launching.Device, room: int) -> tuple[int, Any]:
        out = (self._size * room)()
        arguments = [self._size(size) for size in sizes[:3]] + [row.name.encode() for row in sizes[3:]]
        return function(*arguments, self._device(device), out), list(out)

    def decode(self, m: int, n: int, k: int, row: WeightType, device: launching.Device) -> list[int] | None:
        """Return the values of `decode_plan.plan`."""
        some, out = self._plan(self.library.q6k_ops_plan_decode, (m, n, k, row), device, 9)
        return out if some else None

    def wgmma(self, m: int, n: int, k: int, row: WeightType, device: launching.Device) -> list[int]:
        """Return the configuration and other values of `gemm_wgmma.plan`, and the memory that it takes."""
        return list(self._plan(self.library.q6k_ops_plan_wgmma, (m, n, k, row), device, 13)[1])

    def mma(self, m: int, n: int, k: int, row: WeightType, device: launching.Device) -> list[int]:
        """Return the values of `gemm_mma.plan`."""
        return list(self._plan(self.library.q6k_ops_plan_mma, (m, n, k, row), device, 6)[1])

    def slice_rows(self, m: int, k: int) -> int:
        """Return the value of `expand.slice_rows`."""
        return int(self.library.q6k_ops_slice_rows(self._size(m), self._size(k)))

    def launch(
        self,
        product: Product,
        device: launching.Device,
        pointers: list[int],
        *,
        stride: int,
        bias_kind: int,
        ticket: int,
    ) -> str | None:
        """Launch a product on x, tiles, bias, y, in a stream, with scratch memory, and return the error."""
        numbers = (product.m, product.n, product.k, stride, -(-product.n // 16), bias_kind)
        error = ctypes.create_string_buffer(2000)
        code = self.library.q6k_ops_launch(
            product.kind,
            product.row.name.encode(),
            self._device(device),
            (self._size * 7)(*numbers, product.fp16),
            (ctypes.c_void_p * 6)(*pointers),
            ctypes.c_uint64(ticket),
            error,
            ctypes.c_size_t(len(error)),
        )
        return error.value.decode() if code else None
