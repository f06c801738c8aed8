"""How a GGML tensor is stored in a bundle: which arrays, of which dtype and shape.

| storage     | arrays                                                                     |
|-------------|----------------------------------------------------------------------------|
| planar      | those of its weight type: `X.ql`, … (see `formats.types`)                  |
| plain       | `X`, unchanged: float, bf16 and integer types                              |
| dequantized | `X`, bf16                                                                  |
| raw         | `X`, uint8 rows of GGUF blocks                                             |
| skipped     | none                                                                       |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from q6k_kernels.bundle.shards import ArraySpec
from q6k_kernels.formats.ggml import TYPE_SIZES, GGMLType
from q6k_kernels.formats.types import weight_type

Storage = Literal["planar", "plain", "dequantized", "raw", "skipped"]

STORAGES: tuple[Storage, ...] = get_args(Storage)
PLAIN_DTYPES = {
    "F64": "F64",
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "I64": "I64",
    "I32": "I32",
    "I16": "I16",
    "I8": "I8",
}
"""GGML type -> safetensors dtype, for the types stored unchanged."""


def arrays_of(
    name: str, ggml_type: str, shape: Sequence[int], storage: Storage, format: str | None
) -> dict[str, ArraySpec]:
    """Return the arrays of a tensor by role: those of its weight type, or data; none if it is skipped.

    Args:
        name: the tensor's GGUF name.
        ggml_type: its type's name, for example `Q6_K`.
        shape: torch order; (N, K) or (E, N, K) for planar storage.
        storage: how it is stored.
        format: the name of the weight type of planar storage, else None.

    Raises:
        ValueError: a tensor of this type or shape cannot be stored in this way.
    """
    *lead, last = shape or (1,)
    if (format is not None) != (storage == "planar"):
        raise ValueError(
            f"stored {storage}, and a weight type {format!r}: planar tensors have one, others have none"
        )
    if format is not None:
        row = weight_type(format)
        if ggml_type != row.ggml or len(shape) not in (2, 3) or last % row.block or 0 in shape:
            raise ValueError(f"{ggml_type} of shape {list(shape)} cannot be stored as {format}")
        return {
            array.role: ArraySpec(f"{name}.{array.role}", array.dtype, (*lead, last // array.weights))
            for array in row.arrays
        }
    if storage == "plain":
        if ggml_type not in PLAIN_DTYPES:
            raise ValueError(f"{ggml_type} cannot be stored unchanged")
        return {"data": ArraySpec(name, PLAIN_DTYPES[ggml_type], tuple(shape))}
    if storage == "dequantized":
        return {"data": ArraySpec(name, "BF16", tuple(shape))}
    if storage == "raw":
        return {"data": ArraySpec(name, "U8", (*lead, _row_bytes(ggml_type, last)))}
    return {}


def _row_bytes(ggml_type: str, weights: int) -> int:
    kind = GGMLType.__members__.get(ggml_type)
    if kind is None:
        raise ValueError(f"unknown GGML type {ggml_type}")
    block_weights, block_bytes = TYPE_SIZES[kind]
    if weights % block_weights:
        raise ValueError(f"{ggml_type} rows are multiples of {block_weights} weights, not {weights}")
    return weights // block_weights * block_bytes
