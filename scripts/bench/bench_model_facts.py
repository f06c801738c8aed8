"""Facts about the machine, the bundle and the model, for bench_model.py."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench_model_rows import Row
from q6k_kernels import PackedEmbedding, PackedLinear
from q6k_kernels.weights.experts import PackedStack

READ_PIECE = 64 << 20
_PACKED = PackedLinear | PackedEmbedding | PackedStack


def machine(device: torch.device) -> Row:
    """Describe the machine that the figures were measured on."""
    import transformers

    row: Row = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        row |= {"gpu": gpu.name, "memory_gb": round(gpu.total_memory / 1e9), "cuda": torch.version.cuda}
    return row


def load_the_classes() -> None:
    """Make transformers import its classes before loading is timed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        for kind in ("llama", "gemma3_text", "gemma4_text"):
            sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
            config = AutoConfig.for_model(kind, **sizes, layer_types=["full_attention"])
            AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def read_all(bundle: Path) -> int:
    """Read a bundle's arrays once into the page cache, and return their bytes."""
    total, buffer = 0, bytearray(READ_PIECE)
    for path in sorted(bundle.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of all packed weights, counting shared ones once."""
    layers = [module for module in model.modules() if isinstance(module, _PACKED)]
    return sum({layer.tiles.data_ptr(): layer.tiles.nbytes for layer in layers}.values())


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, counting shared ones once."""
    return sum({each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}.values())


def needed_bytes(model: nn.Module, top: int = 0) -> int:
    """Return the bytes of packed weights that a token needs: linear layers, its experts, its row of the embedding.

    Args:
        model: the model.
        top: experts of a token.
    """
    stacks = [module for module in model.modules() if isinstance(module, PackedStack)]
    experts = sum(each.tiles.nbytes // each.count * top for each in stacks)
    linear = sum(module.tiles.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    embeddings = [module for module in model.modules() if isinstance(module, PackedEmbedding)]
    return experts + linear + sum(each.tiles.nbytes // each.num_embeddings for each in embeddings)
