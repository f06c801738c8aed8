"""The launch of attention in a decoding step on a GPU, `cuda/attend.cuh`; `step_reference` specifies it."""

from __future__ import annotations

import struct
from functools import cache
from itertools import product
from typing import NamedTuple

from torch import Tensor

from q6k_kernels.cuda.device import Device, Variant, pointer
from q6k_kernels.formats.ggml import SUPER_BLOCK
from q6k_kernels.generate.cache_codes import FEW_SLOTS
from q6k_kernels.generate.heads import Cached, Heads
from q6k_kernels.jit.compiler import Defines

ATTEND_FILE, ATTEND, ATTEND_KEYS = "attend.cuh", "q6k_attend", 16
HEAD_DIMS = (64, 96, 128, 256, 512)
ATTEND_WARPS = (8, 4, 2, 1)
"""Warps of a block of attention: the first number that fits."""
BLOCK_BYTES, WARPS_TIMES_DIM = 160 << 10, 2048
"""The most shared memory of a block's rings; and warps times the size of a head, whose sums are in registers."""
LONG_STAGES = {128: 2}
"""For many slots (`cache_codes.FEW_SLOTS`) heads of these sizes have rings of several pieces of keys and values.
Fewer keys come sooner to blocks that find room beside a product's."""
CODES_WARPS = 16
"""For many slots blocks for codes, which take more instructions for each byte, have up to so many warps."""
MOST_HEADS, MOST_BLOCKS = 8, 32
"""The most query heads of a block, and the most blocks that split the keys of one head."""
BLOCKS_OF_TEXTS = 2
"""Blocks for each multiprocessor, where there are several texts, which may be of very different lengths."""
NORMED = {"head": 0, "projection": 1, "rotated head": 2}
"""What has a norm -> its number in the enum `Normed` of `cuda/heads.cuh`."""
_MACROS = ("Q6K_HEAD_DIM", "Q6K_WARPS", "Q6K_STAGES", "Q6K_CODES", "Q6K_FORMS", "Q6K_TEXTS")
_ATTEND = struct.Struct("@PPPPPPPPPPPPPPPPPPPfffiiiiiiiiiPqqq")


def grid(heads: Heads, device: Device, texts: int = 1) -> tuple[int, int, int]:
    """Return the rows of a text's grid, the blocks of a row, which split its keys, and the query heads of a row."""
    group, wanted = heads.count // heads.key_heads, device.multiprocessors * (1 if texts == 1 else BLOCKS_OF_TEXTS)

    def shape(together: int) -> tuple[int, int, int]:
        rows = heads.count // together
        return rows, max(1, min(MOST_BLOCKS, wanted // (rows * texts))), together

    shapes = [shape(count) for count in range(1, MOST_HEADS + 1) if group % count == 0]
    # As many blocks as there are multiprocessors; of such shapes the one that reads keys the fewest times.
    return max(shapes, key=lambda each: (min(each[0] * each[1] * texts, device.multiprocessors), each[2]))


def arguments(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    heads: Heads,
    cached: Cached,
    position: Tensor,
    shared: tuple[Tensor, Tensor],
    outputs: tuple[int, int, int],
    together: int,
) -> bytes:
    """Return the kernel's arguments.

    Args:
        q: queries, see `TorchOperations.attend`, as are the next ones.
        k: keys.
        v: values.
        heads: the heads of the layer.
        cached: its part of the cache.
        position: position of the token, or by place.
        shared: what blocks share: partial sums, float32, and counters, int32, 0.
        outputs: addresses of the 16-bit values, codes and scales; 0 for what is absent.
        together: query heads of a block, see `grid`.
    """
    return _ATTEND.pack(
        *map(pointer, (q, k, v, cached.keys, cached.values, *(cached.scales or (None, None)))),
        *map(pointer, (heads.cosines, heads.sines)),
        *(0 if norm is None else norm.weight.data_ptr() for norm in (heads.q_norm, heads.k_norm)),
        *map(pointer, (position, heads.growth, heads.sinks, *shared)),
        *outputs,
        heads.scale,
        heads.softcap or 0.0,
        0.0 if heads.q_norm is None else heads.q_norm.epsilon,
        cached.keys.shape[-2],
        cached.window,
        together,
        heads.count // heads.key_heads,
        int(heads.values_normed),
        int(heads.gated),
        NORMED[heads.normed],
        2 * heads.cosines.shape[1],
        int(heads.neighbours),
        pointer(cached.places),
        *(0 if each is None else each.stride(0) for each in (q, k, v)),
    )


class Block(NamedTuple):
    """A block of attention.

    Attributes:
        dim: size of a head.
        warps: its warps.
        stages: pieces of 16 keys and values that a warp has in its ring.
        codes: whether keys and values are codes.
    """

    dim: int
    warps: int
    stages: int
    codes: bool

    @property
    def shared_bytes(self) -> int:
        """Bytes of the rings: rows of keys and values with 16 bytes more, of codes also two scales each."""
        piece = ATTEND_KEYS * (self.dim + 16 + 8 if self.codes else 2 * self.dim + 16)
        return 2 * self.warps * self.stages * piece


@cache
def variant(macros: Defines, block: Block, forms: bool, texts: bool) -> Variant:
    """Return the kernel for the macros of a step, a block, and forms: see `has_form`.

    With `texts` it is for a cache with places.
    """
    own = zip(_MACROS, (*block, forms, texts), strict=True)
    return ATTEND_FILE, ATTEND, (*macros, *((name, int(value)) for name, value in own))


def has_form(heads: Heads) -> bool:
    """Check whether heads have another form than the usual one, for which the kernel has less code."""
    turned = heads.normed != "head" or heads.neighbours
    return turned or heads.sinks is not None or heads.count * heads.dim % SUPER_BLOCK > 0


def block_of(dim: int, device: Device, slots: int, codes: bool) -> Block:
    """Return the block for a size of heads and a number of slots to read, at most."""
    room = min(device.shared_bytes - attend_static(dim), BLOCK_BYTES)
    many = slots > FEW_SLOTS["int8" if codes else "model"]
    warps = (CODES_WARPS, *ATTEND_WARPS) if codes and many else ATTEND_WARPS
    every = (Block(dim, each, 1, codes) for each in warps)
    block = next(each for each in every if each.shared_bytes <= room and each.warps * dim <= WARPS_TIMES_DIM)
    wanted = LONG_STAGES.get(dim, 1) if many and not codes else 1
    return block._replace(stages=min(wanted, room // block.shared_bytes))


def attend_static(dim: int) -> int:
    """Return a bound of the attention kernel's static shared memory: queries, keys and values, and 3 KiB."""
    return (MOST_HEADS + 1) * (dim + 8) * 2 + dim * 2 + 2 * dim + (3 << 10)


def attend_bytes(macros: dict[str, int]) -> int:
    """Return the dynamic shared memory of the attention kernel with these macros, in bytes of a block."""
    dim, warps, stages, codes, *_ = (macros[name] for name in _MACROS)
    return Block(dim, warps, stages, bool(codes)).shared_bytes


def variants(macros: Defines, device: Device) -> list[Variant]:
    """Return all kernels with the macros of a step that a GPU may load."""
    either = False, True
    every = product(HEAD_DIMS, (0, max(FEW_SLOTS.values()) + 1), either, either, either)
    found = (
        variant(macros, block_of(dim, device, slots, codes), forms, texts)
        for dim, slots, codes, forms, texts in every
    )
    return list(dict.fromkeys(found))
