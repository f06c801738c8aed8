"""Codes in 64-bit words, a byte a weight, on their way between planes and tiles: single bytes would take far longer.

`formats.planes` and `formats.tiles` have the layouts. v is what tiles keep of a stored code: without the offset, in
two's complement, or the code itself where its type has no offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q6k_kernels.formats.types import WeightType

# The same bits of each of the eight bytes of a word, and every second byte.
_ONES, _NIBBLES, _EVEN = 0x0101010101010101, 0x0F0F0F0F0F0F0F0F, 0x00FF00FF00FF00FF


def of_planes(planes: Sequence[Tensor], row: WeightType) -> Tensor:
    """Return v of code planes as int64 (R, K/8), a byte a weight; works in place, because fresh memory is slow."""
    if row.bits == 8:
        return planes[0].contiguous().view(torch.int64)
    n = len(planes[0])
    # Two elements for every byte of ql, in the order of the weights.
    nibbles = planes[0].contiguous().to(torch.int16)
    nibbles |= nibbles << 4
    v = nibbles.view(torch.int64)
    v &= _NIBBLES
    if row.high_bits == 2:
        # qh's bytes of even and of odd elements side by side, then their four pairs apart.
        high, odd = (
            planes[1].reshape(n, -1, 2, 4)[:, :, parity].to(torch.int64) for parity in (0, 1)
        )  # (R, K/32, 4)
        high |= odd.bitwise_left_shift_(8)
        high |= high << 28
        high &= 0x00000F0F00000F0F
        high |= high << 14
        high &= 3 * _ONES
        v |= high.bitwise_left_shift_(4).view(v.shape)
    elif row.high_bits == 1:
        high = planes[1].to(torch.int64)
        high |= high << 4
        high &= 0x0F0F
        high |= high << 30
        high &= 0x0000030300000303
        high |= high << 15
        high &= _ONES
        v |= high.bitwise_left_shift_(4)
    if row.offset:
        v ^= row.offset * _ONES  # to two's complement
    return v


def split(v: Tensor, b: int, row: WeightType) -> list[Tensor]:
    """Return the code fields of v, int64 (R, 32 B), as int16 in the order of `tiles` behind the row's dimensions."""
    n, low = len(v), row.high_bits
    if row.bits == 8:
        return [v.view(torch.int16)]
    if row.book:
        pairs = ((v | v >> 4) & _EVEN).view(torch.int16).view(n, b, 16, 2, 4)
        return [pairs[:, :, :, 0] | pairs[:, :, :, 1] << 8]
    high = (v >> low & _NIBBLES).view(n, b, 8, 2, 2)  # (R, B, byte, group of it, b >> 1)
    fields = [(high[..., 0, :] | high[..., 1, :] << 4).view(torch.int16)]
    if low:
        parts = (v & ((1 << low) - 1) * _ONES).view(n, b, 2 * low, 8 // low, 2)
        joined = parts[..., 0, :].clone()
        for each in range(1, 8 // low):
            joined |= parts[..., each, :] << low * each
        fields.append(joined.view(torch.int16))
    return fields


def join(fields: Sequence[Tensor], row: WeightType) -> Tensor:
    """Return the stored codes, uint8 (R, 256 B), of the code fields of some rows: the inverse of `split`."""
    n, b = fields[0].shape[:2]
    words = fields[0].contiguous().view(n, b, -1)
    if row.bits == 8:
        return words.view(torch.uint8).view(n, -1)
    out = torch.empty(n, 32 * b, dtype=torch.int64, device=words.device)
    if row.book:
        pairs = torch.stack((words.view(n, b, 16, 4) & 0xFF, words.view(n, b, 16, 4) >> 8 & 0xFF), 3)
        joined = pairs.view(torch.int64).view(n, -1)
        torch.bitwise_and(joined | joined << 4, _NIBBLES, out=out)
        return out.view(torch.uint8)
    low = row.high_bits
    high = words.view(torch.int64).view(n, b, 8, 2)
    halves = out.view(n, b, 8, 2, 2)
    halves[..., 0, :] = (high & _NIBBLES) << low
    halves[..., 1, :] = (high >> 4 & _NIBBLES) << low
    if low:
        parts = fields[1].contiguous().view(n, b, -1).view(torch.int64).view(n, b, 2 * low, 2)
        groups = out.view(n, b, 2 * low, 8 // low, 2)
        for each in range(8 // low):
            groups[..., each, :] |= parts >> low * each & ((1 << low) - 1) * _ONES
    if row.offset:
        out ^= row.offset * _ONES
    return out.view(torch.uint8)


def code_planes(codes: Tensor, row: WeightType) -> list[Tensor]:
    """Return the code planes of stored codes, uint8 (R, K): the inverse of `of_planes`."""
    if row.bits == 8:
        return [codes.view(torch.int8)]
    u = codes.view(torch.int64)
    nibbles = (u & _NIBBLES).view(torch.int16)
    planes = [(nibbles | nibbles >> 4).to(torch.uint8)]
    if row.high_bits == 2:
        pairs = (u >> 4 & 3 * _ONES).view(len(u), -1, 4)
        both = pairs | pairs >> 14 | pairs >> 28 | pairs >> 42
        planes.append(torch.stack((both & 0xFF, both >> 8 & 0xFF), dim=2).to(torch.uint8).view(len(u), -1))
    elif row.high_bits == 1:
        bits = u >> 4 & _ONES
        both = bits | bits >> 15 | bits >> 30 | bits >> 45
        planes.append((both & 15 | both >> 4 & 0xF0).to(torch.uint8))
    return planes


def code_values(codes: Tensor, row: WeightType) -> Tensor:
    """Return stored codes, uint8 of any shape, minus their offset or looked up, as float32."""
    if row.book:
        return torch.tensor(row.book, dtype=torch.float32, device=codes.device)[codes.int()]
    if row.bits == 8:
        return codes.view(torch.int8).float()
    return codes.float().sub_(row.offset)
