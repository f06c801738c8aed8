"""Describe a GGUF, a plan, a bundle or a verification as plain data, for tables and for `--json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from q6k_convert.convert.pipeline import Result
from q6k_convert.convert.plan import Plan
from q6k_convert.run.memory import NOT_LOADED, model_memory
from q6k_convert.text import displayable
from q6k_kernels.bundle.manifest import BundleError, Manifest, StoredTensor
from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import ModelError
from q6k_kernels.formats.ggml import TYPE_SIZES, GGMLType
from q6k_kernels.gguf.model import GGUFModel
from q6k_kernels.text import listing

Row = dict[str, Any]

_GROWN = 1.05
"""Ratio of sizes from which on something counts as grown."""
TOKENIZERS_ABSENT = "not known before the package tokenizers is installed (`pip install 'q6k-convert[inference]'`)"
"""What stands for the verdict on a file's tokenizer where it cannot be had."""
_SHOWN_BYTES = 16 << 20
"""Bytes of values that a listing of keys shows; no real model has as many without a whole `tokenizer.json`."""
_ESCAPED = "backslashreplace"


def plan_contents(plan: Plan) -> Row:
    """Describe a plan: sources, storage of each type of tensor, bytes in and out, shards, and what can run."""
    metadata = Metadata(plan.model.parts[0])
    rows = _by_type(
        (t.record.type.name, t.storage, t.format, math.prod(t.record.shape), t.record.nbytes, t.bytes_out)
        for t in plan.tensors
    )
    return {
        "sources": [str(part.path) for part in plan.model.parts],
        "architecture": plan.model.architecture,
        "options": plan.options.recorded(),
        "tensors": len(plan.tensors),
        "tied_head": plan.model.is_tied(),
        "types": rows,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "bundle_bytes": plan.bundle_bytes,
        "growing": [row for row in rows if row["bytes_out"] > _GROWN * row["bytes_in"]]
        if plan.bundle_bytes > _GROWN * plan.bytes_in
        else [],
        "model": _runs(metadata, {t.record.name: (t.record.shape, t.storage) for t in plan.tensors}),
        "gpu": model_memory(
            metadata,
            {t.record.name: (t.record.shape, t.format) for t in plan.tensors if t.storage not in NOT_LOADED},
        ),
        "shards": [{"name": shard.name, "bytes": shard.size} for shard in plan.shards],
    }


def result_contents(result: Result, peak_memory: int) -> Row:
    """Describe a finished conversion: sizes in bytes, bits per weight, time in seconds and rate."""
    stored = [t for t in result.manifest.tensors if t.arrays]
    planar = [t for t in stored if t.storage == "planar"]
    return {
        "output": str(result.output),
        "tensors_planar": len(planar),
        "tensors_other": len(stored) - len(planar),
        "tensors_skipped": len(result.manifest.tensors) - len(stored),
        "bytes_in": result.bytes_in,
        "bytes_out": result.bytes_out,
        "bits_per_weight": bits_per_weight(stored),
        "bits_per_weight_planar": bits_per_weight(planar),
        "seconds": round(result.seconds, 3),
        "bytes_in_per_second": round(result.bytes_in / max(result.seconds, 1e-9)),
        "peak_memory_bytes": peak_memory,
    }


def gguf_contents(model: GGUFModel) -> Row:
    """Describe a GGUF: files, keys with their values (of arrays only type and length), tensors."""
    tensors = [
        {
            "name": r.name,
            "type": r.type.name,
            "shape": list(r.shape),
            "bytes": r.nbytes,
            "file": part.path.name,
            "offset": r.offset,
        }
        for part, r in model.tensors()
    ]
    return {
        "kind": "gguf",
        "files": [
            {"name": p.path.name, "bytes": p.size, "version": p.version, "alignment": p.alignment}
            for p in model.parts
        ],
        "architecture": model.architecture,
        "tied_head": model.is_tied(),
        "types": _by_type(
            (r.type.name, None, None, math.prod(r.shape), r.nbytes, r.nbytes) for _, r in model.tensors()
        ),
        "keys": _keys(model),
        "tensors": tensors,
    }


def bundle_contents(directory: Path, manifest: Manifest) -> Row:
    """Describe a bundle: producer, options, sources, files, tensors, and bytes of its arrays."""
    return {
        "kind": "bundle",
        "path": str(directory),
        "producer": manifest.producer,
        "architecture": manifest.architecture,
        "options": manifest.options,
        "sources": [{"name": s.name, "bytes": s.size, "checksum": s.checksum} for s in manifest.sources],
        "files": [{"name": name, "bytes": file.size} for name, file in manifest.files.items()],
        "tied": manifest.tied,
        "types": _by_type(
            (t.type, t.storage, t.format, math.prod(t.shape), _source_bytes(t), t.nbytes) for t in manifest.tensors
        ),
        "bytes": sum(t.nbytes for t in manifest.tensors),
        "bits_per_weight": bits_per_weight([t for t in manifest.tensors if t.arrays]),
        "tensors": [
            {
                "name": t.name,
                "type": t.type,
                "shape": t.shape,
                "storage": t.storage,
                "format": t.format,
                "bytes": t.nbytes,
                "arrays": {
                    role: {"key": a.key, "dtype": a.dtype, "shape": a.shape, "file": a.file}
                    for role, a in t.arrays.items()
                },
            }
            for t in manifest.tensors
        ],
    }


def _runs(metadata: Metadata, tensors: dict[str, tuple[tuple[int, ...], str]]) -> Row:
    """Return what stands in the way of running the whole model, and of its tokenizer; None where nothing does.

    This is what keys and shapes tell. Loading the model compares every tensor.
    """
    from q6k_kernels.models.cache_layout import cache_bytes

    problem = tokenizer = None
    left_out = [name for name, (_, storage) in tensors.items() if storage in NOT_LOADED]
    try:
        cache_bytes(metadata, {name: shape for name, (shape, _) in tensors.items()}, 1)
        if left_out:
            problem = f"tensors that are not stored, or only as GGUF blocks: {listing(left_out, most=3)}"
    except BundleError as error:
        problem = str(error)
    except ModelError as error:
        problem = error.cause
    if find_spec("tokenizers") is None:
        tokenizer = TOKENIZERS_ABSENT
    else:
        from q6k_kernels.tokenizer.vocabulary import check_kind

        try:
            check_kind(metadata)
        except BundleError as error:
            tokenizer = str(error)
        except ModelError as error:
            tokenizer = error.cause
    return {"problem": problem, "tokenizer_problem": tokenizer}


def _keys(model: GGUFModel) -> Row:
    """Return the keys with their values; of arrays type and length, of text past `_SHOWN_BYTES` its bytes."""
    shown, left = Row(), _SHOWN_BYTES
    for part, kv in model.key_values():
        if kv.element is not None:
            value: Any = {"array": kv.element.name, "count": kv.count}
        elif kv.end - kv.at > left:
            value = {"string": kv.end - kv.at - 8}
        else:
            left -= kv.end - kv.at
            value = part.value(kv.key, errors=_ESCAPED)
        shown[displayable(kv.key)] = value
    return shown


def key_value(model: GGUFModel, key: str) -> Iterator[list[Any]] | Any:
    """Return the full value of a key, of an array some elements at a time; bytes that are no UTF-8 as escapes.

    Raises:
        KeyError: there is no such key.
    """
    found = model.find(key)
    if found is None:
        raise KeyError(key)
    part, kv = found
    return part.value(key, errors=_ESCAPED) if kv.element is None else part.elements(key, _ESCAPED)


def _by_type(tensors: Iterable[tuple[str, str | None, str | None, int, int, int]]) -> list[Row]:
    """Return totals per type, storage and weight type, most weights first."""
    rows = dict[tuple[str, str | None], Row]()
    for kind, storage, format, weights, bytes_in, bytes_out in tensors:
        empty = {"tensors": 0, "weights": 0, "bytes_in": 0, "bytes_out": 0}
        row = rows.setdefault((kind, storage), {"type": kind, "storage": storage, "format": format} | empty)
        row["tensors"] += 1
        row["weights"] += weights
        row["bytes_in"] += bytes_in
        row["bytes_out"] += bytes_out
    for row in rows.values():
        row["bits_per_weight"] = round(8 * row["bytes_out"] / max(row["weights"], 1), 4)
    return sorted(rows.values(), key=lambda row: -row["weights"])


def _source_bytes(tensor: StoredTensor) -> int:
    """Return the bytes that a tensor takes in a GGUF."""
    kind = GGMLType.__members__.get(tensor.type)
    block_weights, block_bytes = TYPE_SIZES[kind] if kind is not None else (1, 0)
    return math.prod(tensor.shape) // block_weights * block_bytes


def bits_per_weight(tensors: list[StoredTensor]) -> float | None:
    """Return the bits that a weight takes, 0 if all tensors are empty; None without tensors."""
    weights = sum(math.prod(t.shape) for t in tensors)
    return round(8 * sum(t.nbytes for t in tensors) / max(weights, 1), 4) if tensors else None
