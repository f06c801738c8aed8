"""Codes in 64-bit words, a byte a weight, on their way between planes and tiles: single bytes would take longer.

`formats.planes` and `formats.tiles` have the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q6k_kernels.formats.types import WeightType

# The same bits of each of the eight bytes of a word, and every second byte.
_ONES, _NIBBLES, _EVEN = 0x0101010101010101, 0x0F0F0F0F0F0F0F0F, 0x00FF00FF00FF00FF


def of_planes(planes: Sequence[Tensor], row: WeightType) -> Tensor:
    """Return the stored codes of code planes, int64 (R, K/8); works in place, because fresh memory is slow."""
    if row.bits == 8:
        plane = planes[0].contiguous()
        return (plane.clone() if plane.storage_offset() % 8 else plane).view(torch.int64)
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
    return v


def split(codes: Tensor, b: int, row: WeightType) -> list[Tensor]:
    """Return the code fields of int64 (R, 32 B) as int16, in the order of `tiles` behind the row's dimensions."""
    n, rest = len(codes), row.high_bits
    if row.bits == 8:
        return [codes.view(torch.int16)]
    if row.book:
        pairs = ((codes | codes >> 4) & _EVEN).view(torch.int16).view(n, b, 16, 2, 4)
        return [pairs[:, :, :, 0] | pairs[:, :, :, 1] << 8]
    first, second = codes.view(n, b, 4, 2, 2, 2).unbind(3)  # s = 0, 1 and s = 2, 3: (R, B, q, s & 1, b >> 1)
    fields = [(first & _NIBBLES | (second >> rest & _NIBBLES) << 4).view(torch.int16)]
    if rest:
        mask = ((1 << rest) - 1) * _ONES
        both = (second & mask | (first >> 4 & mask) << rest).view(n, b, rest * 2, 4 // rest, 2)
        joined = both[..., 0, :].clone()
        for each in range(1, 4 // rest):
            joined |= both[..., each, :] << 2 * rest * each
        fields.append(joined.view(torch.int16))
    return fields


def join(fields: Sequence[Tensor], row: WeightType) -> Tensor:
    """Return the stored codes, uint8 (R, 256 B), of the code fields of some rows: the inverse of `split`."""
    n, b = fields[0].shape[:2]
    words = fields[0].contiguous().flatten(2)
    if row.bits == 8:
        return words.view(torch.uint8).flatten(1)
    out = torch.empty(n, 32 * b, dtype=torch.int64, device=words.device)
    if row.book:
        four = words.view(n, b, 16, 4)
        pairs = torch.stack((four & 0xFF, four >> 8 & 0xFF), 3).view(torch.int64).flatten(1)
        torch.bitwise_and(pairs | pairs << 4, _NIBBLES, out=out)
        return out.view(torch.uint8)
    rest, nibbles = row.high_bits, words.view(torch.int64).view(n, b, 4, 2, 2)
    first, second = out.view(n, b, 4, 2, 2, 2).unbind(3)
    first.copy_(nibbles & _NIBBLES)
    second.copy_((nibbles >> 4 & _NIBBLES) << rest)
    if rest:
        joined = fields[1].contiguous().flatten(2).view(torch.int64).view(n, b, 2 * rest, 1, 2)
        both = torch.cat([joined >> 2 * rest * each for each in range(4 // rest)], 3).view(n, b, 4, 2, 2)
        mask = ((1 << rest) - 1) * _ONES
        second |= both & mask
        first |= (both >> rest & mask) << 4
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
