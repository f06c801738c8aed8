"""Tell what memory a model takes before it is loaded: weights, and the cache of a text of some length.

Imports no torch, but to look at the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import EnvironmentMissingError, UsageError
from q6k_kernels.bundle.manifest import BundleError, Manifest, StoredTensor
from q6k_kernels.bundle.metadata import Metadata, read_metadata
from q6k_kernels.errors import ModelError
from q6k_kernels.formats.ggml import SUPER_BLOCK
from q6k_kernels.formats.types import TILE_ROWS, weight_type

if TYPE_CHECKING:
    import torch

NOT_LOADED = ("raw", "skipped")
"""Storages of tensors that no model loads."""
Sizes = Mapping[str, tuple[tuple[int, ...], str | None]]
"""Shape and weight type of tensors by name; None for the type of those that are not packed."""


def bundle_memory(directory: Path, manifest: Manifest, context: int | None) -> dict[str, Any]:
    """Describe the GPU memory that a bundle's model takes with a context length, by default its own."""
    return model_memory(read_metadata(directory), loaded_sizes(manifest.tensors), context)


def loaded_sizes(tensors: Iterable[StoredTensor]) -> Sizes:
    """Return shape and type of the tensors of a bundle that a model loads."""
    return {each.name: (tuple(each.shape), each.format) for each in tensors if each.storage not in NOT_LOADED}


def model_memory(
    metadata: Metadata, tensors: Sizes, context: int | None = None, element_bytes: int = 2, *, codes: bool = False
) -> dict[str, Any]:
    """Return bytes of weights, of the cache, and of what a prompt expands of one of codes.

    Where those of the cache are not known, they are None, and it is said why.

    Args:
        metadata: the model's hyper-parameters.
        tensors: the tensors that are there to load.
        context: tokens of the longest text; by default as many as the model knows.
        element_bytes: size of a key's or value's element, and of those of weights that are not packed.
        codes: whether keys and values are codes of 8 bits.
    """
    from q6k_kernels.models.architecture import is_beside, is_of_encoder
    from q6k_kernels.models.cache_layout import cache_bytes, prompt_bytes

    try:
        beside = [name for name in tensors if is_beside(name, metadata)]
    except BundleError:  # of a key, which the problem below names
        beside = [name for name in tensors if is_of_encoder(name)]
    loaded = tensors.keys() - set(beside)
    result: dict[str, Any] = {
        "weights_bytes": sum(_resident(*tensors[name], element_bytes) for name in loaded),
        "tensors_beside": len(beside),
        "context": None,
        "cache_type": "int8" if codes else "model",
        "cache_bytes": None,
        "prompt_bytes": 0,
        "cache_problem": None,
    }
    try:
        length = metadata.context_length if context is None else context
        result["context"] = length
        if length is not None:
            shapes = {name: shape for name, (shape, _) in tensors.items()}
            result["cache_bytes"] = cache_bytes(metadata, shapes, length, element_bytes, codes=codes)
            if codes:
                result["prompt_bytes"] = prompt_bytes(metadata, shapes, length, element_bytes)
        else:
            result["cache_problem"] = "the model states no context length"
    except BundleError as error:
        result["cache_problem"] = str(error)
    except ModelError as error:
        result["cache_problem"] = error.cause
    return result


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU; None for the CPU, whose memory the system shares out."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def planned(memory: dict[str, Any], free: int | None, *, cached: bool = True, texts: int = 1) -> str:
    """Return the line of a plan: what weights and cache take, and what is free; "" if there is nothing to say.

    Args:
        memory: what `model_memory` returned.
        free: bytes that are free on the GPU, or None.
        cached: whether there will be a cache.
        texts: the texts that it is for, each of so many tokens.

    Raises:
        EnvironmentMissingError: the weights alone do not fit.
        UsageError: weights and cache do not fit, or there is no room for a prompt besides.
    """
    weights, cache = memory["weights_bytes"], cached * texts * (memory["cache_bytes"] or 0)
    prompt = memory["prompt_bytes"] if cached and free is not None else 0  # a GPU's chunks expand codes
    if free is not None and weights > free:
        raise EnvironmentMissingError(
            f"the weights take {text.size(weights)} of GPU memory, and {text.size(free)} are free",
            "Free some, take a smaller model or a larger GPU, or run on the CPU: --device cpu.",
        )
    parts = [f"{text.size(weights)} of weights"] if free is not None else []
    if cached and memory["cache_problem"] is not None:
        parts.append(f"a cache whose size is not known: {memory['cache_problem']}")
    elif cached:
        tokens = text.plural(memory["context"], "token")
        tokens = tokens if texts == 1 else f"{texts} texts of {tokens}"
        kind = "cache" if memory["cache_type"] == "model" else f"{memory['cache_type']} cache"
        more = f", {text.size(prompt)} more for prompts" if prompt else ""
        parts.append(f"{text.size(cache)} of {kind} for {tokens}{more}")
        if free is not None and weights + cache + prompt > free:
            raise UsageError(
                f"the cache of {tokens} takes {text.size(cache)} of GPU memory{more}; of {text.size(free)} free, "
                f"the weights leave {text.size(free - weights)}",
                ("Give a shorter --context" if texts == 1 else "Give fewer --texts, or a shorter --context")
                + ("." if memory["cache_type"] == "int8" else ", or halve the cache: --cache int8."),
            )
    of_free = "" if free is None else f", {text.size(free)} are free"
    return f"memory: {' and '.join(parts)}{of_free}" if parts else ""


def _resident(shape: tuple[int, ...], format: str | None, element_bytes: int) -> int:
    """Return the bytes of a tensor in memory: whole tiles if it is packed, else single elements."""
    if format is None:
        return element_bytes * math.prod(shape)
    *stack, n, k = shape
    return math.prod(stack) * -(-n // TILE_ROWS) * -(-k // SUPER_BLOCK) * weight_type(format).tile_bytes
