"""Build the dense reference of a packed model: transformers' own layers with dequantised weights.

The weights come from a GGUF file by the `gguf` package's dequantisation, which shares only the configuration and
the names with the packed model; or from a bundle alone, by unpacking its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from q6k_convert import open_gguf
from q6k_kernels import PackedWeight, open_bundle
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.gguf.file import GGUFFile
from q6k_kernels.gguf.tensors import TensorRecord
from q6k_kernels.models.architecture import (
    FREQUENCY_FACTORS,
    Architecture,
    gguf_names,
    make_config,
)
from q6k_kernels.models.registry import architecture_of

PIECE_WEIGHTS = 1 << 24
"""Weights dequantised at a time."""


def dense_model(bundle: Path, source: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a transformers model for causal language modelling, in eval mode, with dense weights.

    Args:
        bundle: bundle with the configuration and, without `source`, the weights.
        source: GGUF that the bundle was made from.
        device: device of the model.
        dtype: dtype of all weights.

    Raises:
        ValueError: the weights do not match the model.
        ModelError, GgufError, OSError: see `q6k_kernels.load_model` and `q6k_convert.open_gguf`.
    """
    from transformers import AutoModelForCausalLM

    metadata = read_metadata(bundle)
    architecture = architecture_of(metadata)
    with _weights(bundle, source) as (shapes, rows):
        config: Any = make_config(architecture, metadata, shapes)
        attention = {"attn_implementation": "eager"} if architecture.softcap_of_scores(config) else {}
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)  # type: ignore[no-untyped-call]
        parameters = dict(model.named_parameters())
        names = gguf_names(architecture, list(parameters), config.num_hidden_layers)
        if other := set(names.values()) ^ (shapes.keys() - {FREQUENCY_FACTORS}):
            where = source or bundle
            raise ValueError(f"{where}: {min(other)} is a tensor of it or of {type(model).__name__}, not of both")
        for parameter, name in names.items():
            _fill(parameters[parameter], _arranged(rows(name), name, architecture, config.head_dim))
        if FREQUENCY_FACTORS in shapes:
            rotary = model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.cat([*rows(FREQUENCY_FACTORS)]).to(device)
    return model.eval().requires_grad_(False)


def _fill(parameter: Tensor, pieces: Iterator[Tensor]) -> None:
    at = 0
    for piece in pieces:
        parameter.data[at : at + len(piece)] = piece.to(parameter.device)
        at += len(piece)
    if at != len(parameter):
        raise ValueError(f"expected {len(parameter)} rows, found {at}")


def _arranged(pieces: Iterator[Tensor], name: str, architecture: Architecture, head_dim: int) -> Iterator[Tensor]:
    """Yield rows as transformers has them: norms without GGUF's offset, rows of q and k with their halves apart."""
    if architecture.norm_offset and name.endswith("norm.weight"):
        yield from (piece - architecture.norm_offset for piece in pieces)
    elif architecture.name in ("llama", "mistral") and (".attn_q." in name or ".attn_k." in name):
        whole = torch.cat([*pieces])
        pairs = whole.view(-1, head_dim // 2, 2, *whole.shape[1:])
        yield pairs.transpose(1, 2).reshape(whole.shape)
    else:
        yield from pieces


@contextmanager
def _weights(
    bundle: Path, source: Path | None
) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Iterator[Tensor]]]]:
    """Yield shapes by GGUF name, and a function that yields a tensor's rows in pieces."""
    if source is None:
        opened = open_bundle(bundle)
        yield {t.name: tuple(t.shape) for t in opened.manifest.tensors}, lambda name: _unpacked(opened.load(name))
        return
    with open_gguf(source) as file:
        tensors = {record.name: (part, record) for part, record in file.tensors()}
        yield {name: record.shape for name, (_, record) in tensors.items()}, lambda n: _dequantized(*tensors[n])


def _unpacked(tensor: PackedWeight | Tensor) -> Iterator[Tensor]:
    yield tensor.dequantize(torch.float32) if isinstance(tensor, PackedWeight) else tensor.float()


def _dequantized(part: GGUFFile, record: TensorRecord) -> Iterator[Tensor]:
    columns = record.shape[-1] if len(record.shape) > 1 else 1
    count = record.shape[0]
    step = max(1, PIECE_WEIGHTS // columns) if columns > 1 else count
    row_bytes = record.nbytes // count
    for at in range(0, count, step):
        rows = min(step, count - at)
        raw = np.frombuffer(part.read(record.offset + at * row_bytes, rows * row_bytes), dtype=np.uint8)
        kind = gguf.GGMLQuantizationType[record.type.name]
        values = gguf.dequantize(raw.reshape(rows, -1), kind).astype(np.float32, copy=False)
        # A copy, because the original may be read-only.
        yield torch.from_numpy(values.reshape(rows, *record.shape[1:]).copy())
