"""Many rows of 16-bit activations on Hopper: how `csrc/gemm_wgmma.cuh` is launched.

A block computes ROWS x TOKENS outputs over all of K, or, as one of a cluster, over a part of it. Few tokens: small
blocks, several to a multiprocessor, K split until the GPU is full. Many: the largest blocks, since weights are
expanded once for each block of tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch
from torch import Tensor

from q6k_kernels import driver, jit
from q6k_kernels.ggml_types import SUPER_BLOCK
from q6k_kernels.launching import Device, Variant, bias_arguments, common_macros, is_exact, stream
from q6k_kernels.prepack import TILE_BYTES
from q6k_kernels.reference import TILE_ROWS

FILE, KERNEL = "gemm_wgmma.cuh", "q6k_gemm_wgmma"
ARCH = 90
"""The one architecture with these instructions."""
CLUSTERS = (1, 2, 4, 8)
_ARGUMENTS = struct.Struct("@PPPiiiiii128s")


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for; the macros of `csrc/gemm_wgmma.cuh` say more.

    Attributes:
        tokens: of a block's outputs.
        consumers: warpgroups that multiply, 64 rows each.
        tile_stages: super-blocks of tiles on their way.
        x_stages: steps of 64 columns of x on their way.
        occupancy: blocks on a multiprocessor.
        cycles: clock cycles that a super-block takes a multiprocessor, fitted to measurements on an H200.
    """

    tokens: int
    consumers: int
    tile_stages: int
    x_stages: int
    occupancy: int
    cycles: int

    @property
    def rows(self) -> int:
        """Of a block's outputs."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Of a block: the consumers, and those that copy."""
        return self.consumers * 128 + (128 if self.tokens > 128 else 64)

    def shared_bytes(self, exact: bool) -> int:
        """Of a block; on top of 1 KB to align."""
        tile = TILE_BYTES["exact" if exact else "bf16"]
        rings = self.x_stages * self.tokens * 128 + self.tile_stages * self.rows // TILE_ROWS * tile
        return rings + self.consumers * 4 * 512 + (self.x_stages + self.tile_stages) * 16


CONFIGS = (
    Config(16, 1, 3, 8, 3, 940),
    Config(32, 1, 3, 4, 3, 980),
    Config(64, 1, 2, 4, 3, 1150),
    Config(64, 2, 3, 6, 1, 2330),
    Config(128, 1, 3, 4, 2, 1840),
    Config(128, 2, 3, 6, 1, 3300),
    Config(256, 2, 2, 5, 1, 4880),
)


@dataclass(frozen=True)
class Plan:
    """One launch: the kernel, blocks of a cluster that split K, blocks of tokens, blocks of rows."""

    config: Config
    cluster: int
    token_blocks: int
    row_blocks: int


def plan_of(config: Config, cluster: int, m: int, n: int) -> Plan:
    """The launch of a configuration for an output (m, n)."""
    return Plan(config, cluster, -(-m // config.tokens), -(-n // config.rows))


@lru_cache(maxsize=4096)
def plan(m: int, n: int, k: int, device: Device) -> Plan:
    """The launch that should be fastest.

    Args:
        m: rows of activations, at least 1.
        n: rows of the weight.
        k: columns of both.
        device: what the GPU offers.
    """
    candidates = [
        plan_of(config, cluster, m, n)
        for config, cluster in product(CONFIGS, CLUSTERS)
        if cluster <= min(k // SUPER_BLOCK, _most_split(config))
    ]
    return min(candidates, key=lambda candidate: _cost(candidate, k, device))


def _may_split(config: Config) -> bool:
    return config.tokens <= 128


def _most_split(config: Config) -> int:
    """The largest cluster to choose: it has to fit a part of the GPU (a GPC), and large blocks leave gaps there."""
    return {1: 2, 2: 4}.get(config.occupancy, 8) if _may_split(config) else 1


def _cost(candidate: Plan, k: int, device: Device) -> float:
    """Clock cycles of the fullest multiprocessor, roughly: constants are fitted to measurements on an H200."""
    config, cluster = candidate.config, candidate.cluster
    depth = -(-(k // SUPER_BLOCK) // cluster)
    fullest = -(-candidate.token_blocks * candidate.row_blocks * cluster // device.multiprocessors)
    waiting = 1 + 0.3 * max(0, min(config.occupancy, 3) - fullest)  # less to hide behind than when measured
    ends = 4000 + (4000 + cluster * (600 + 10 * config.tokens) if cluster > 1 else 0)
    return fullest * depth * config.cycles * waiting + ends


@lru_cache(maxsize=4096)
def parts(m: int, n: int, k: int, device: Device) -> tuple[tuple[int, int, Plan], ...]:
    """One launch, or two if the last wave of blocks would leave most of the GPU idle: (first row, rows, plan) each.

    The arguments are those of `plan`. The first of two launches has only full waves; a better plan does the rest.
    """
    whole = plan(m, n, k, device)
    outputs = whole.token_blocks * whole.row_blocks
    waves = outputs // (device.multiprocessors * whole.config.occupancy)
    main = waves * device.multiprocessors * whole.config.occupancy // whole.token_blocks * whole.config.rows
    if whole.cluster > 1 or not 0 < main < n:
        return ((0, n, whole),)
    first, rest = plan_of(whole.config, 1, m, main), plan(m, n - main, k, device)
    if _cost(first, k, device) + _cost(rest, k, device) < _cost(whole, k, device):
        return (0, main, first), (main, n - main, rest)
    return ((0, n, whole),)


def linear(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    y: Tensor,
    device: Device,
    chosen: Plan | None = None,
) -> None:
    """Launches what `q6k_kernels.cuda.linear` has checked.

    Args:
        x: bf16 or fp16 (M, K), M >= 1, rows and start 16-byte aligned.
        tiles: uint8 (T, K/256, tile_bytes).
        bias: (n,) or None.
        n: rows of the weight.
        y: x's dtype (M, n), contiguous.
        device: of all of them, of compute capability 9.0.
        chosen: forces a plan, to measure it.
    """
    m, k = x.shape
    for first, rows, each in parts(m, n, k, device) if chosen is None else ((0, n, chosen),):
        begin = first // TILE_ROWS
        part = tiles[begin : begin - (-rows // TILE_ROWS)]
        of_bias = bias if bias is None else bias[first : first + rows]
        _launch(each, x, part, of_bias, y[:, first : first + rows], device)


def _launch(chosen: Plan, x: Tensor, tiles: Tensor, bias: Tensor | None, y: Tensor, device: Device) -> None:
    (m, k), n = x.shape, y.shape[1]
    exact, fp16 = is_exact(tiles), x.dtype == torch.float16
    config = chosen.config
    kernel = jit.load(*_variant(config, chosen.cluster > 1, exact, fp16), device.index)
    x_map = _tensor_map(x.data_ptr(), fp16, m, k, x.stride(0) * 2, config.tokens)
    arguments = _ARGUMENTS.pack(
        tiles.data_ptr(),
        y.data_ptr(),
        *bias_arguments(bias),
        m,
        n,
        k,
        tiles.shape[0],
        y.stride(0),
        x_map,
    )
    outputs = chosen.token_blocks * chosen.row_blocks
    if chosen.cluster == 1:
        outputs = min(outputs, device.multiprocessors * config.occupancy)
    kernel.launch(
        (chosen.cluster * outputs, 1, 1),
        config.threads,
        arguments,
        stream=stream(device),
        shared_bytes=config.shared_bytes(exact),
        cluster=chosen.cluster,
        dependent=True,
    )


@lru_cache(maxsize=256)
def _tensor_map(pointer: int, fp16: bool, m: int, k: int, stride: int, tokens: int) -> bytes:
    return driver.encode_tensor_map_2d(pointer, "fp16" if fp16 else "bf16", m, k, stride, tokens, 64)


@cache
def _variant(config: Config, split: bool, exact: bool, fp16: bool) -> Variant:
    macros = (
        ("Q6K_TOKENS", config.tokens),
        ("Q6K_CONSUMERS", config.consumers),
        ("Q6K_TILE_STAGES", config.tile_stages),
        ("Q6K_X_STAGES", config.x_stages),
        ("Q6K_SPLIT", int(split)),
        ("Q6K_OCCUPANCY", config.occupancy),
    )
    return FILE, KERNEL, common_macros(exact, fp16) + macros


def variants(device: Device) -> list[Variant]:
    """All that `linear` may load on a GPU."""
    if device.arch != ARCH:
        return []
    return [
        _variant(config, split, exact, fp16)
        for config, split, exact, fp16 in product(CONFIGS, (False, True), (False, True), (False, True))
        if not split or _may_split(config)
    ]
