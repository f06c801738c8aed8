"""Tiny models whose logits llama.cpp has computed: their metadata, and the names and shapes of their tensors.

A case is written as its GGUF file has it, so that neither transformers nor our own models have a say in it. All
weights are F32, with which llama.cpp computes in fp32 throughout. A weight is a byte of SHAKE-256, seeded by the
case and the tensor's name, times a number: the same on every machine and with every version of any library.

`golden_logits.py` makes the numbers in `tests/models/golden`; `tests/models/test_golden_logits.py` compares.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, NDArray[np.float32]]

ATTENTION = {"attn_norm": "h", "attn_q": "qh", "attn_k": "kh", "attn_v": "kh", "attn_output": "hq"}
NETWORK = {"ffn_norm": "h", "ffn_gate": "fh", "ffn_up": "fh", "ffn_down": "hf"}
HEAD_NORMS = {"attn_q_norm": "d", "attn_k_norm": "d"}
PLAIN_NETWORK = {name: letters for name, letters in NETWORK.items() if name != "ffn_norm"}
SHARED_AND_ROUTED = {
    "ffn_gate_inp": "eh",
    "ffn_gate_exps": "emh",
    "ffn_up_exps": "emh",
    "ffn_down_exps": "ehm",
    "ffn_gate_inp_shexp": "h",
    "ffn_gate_shexp": "fh",
    "ffn_up_shexp": "fh",
    "ffn_down_shexp": "hf",
}
DELTA_NET = {
    "attn_qkv": "ch",
    "attn_gate": "ih",
    "ssm_alpha": "nh",
    "ssm_beta": "nh",
    "ssm_conv1d": "cw",
    "ssm_norm": "s",
    "ssm_out": "hi",
}
GATED_ATTENTION = {"attn_q": "gh", "attn_k": "kh", "attn_v": "kh", "attn_output": "hq"} | HEAD_NORMS
NORMS_AFTER = {"post_attention_norm": "h", "post_ffw_norm": "h"}
OUTSIDE = {"token_embd": "vh", "output_norm": "h"}
"""Names of tensors -> a letter for each dimension, rows first; `shapes` gives the letters their sizes."""
GAIN = 1.2
"""Spread of what a matrix makes of numbers of spread 1."""
_BYTE_SPREAD = 256 / math.sqrt(12)


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        architecture: its `general.architecture`.
        keys: its metadata, without `ARCHITECTURE.` before the names.
        tensors: the shapes of its tensors, rows first.
        values: tensors whose numbers are not random.
        prompt: tokens of the prompt.
        answer: tokens to generate.
        seed: changes all random numbers.
        gelu: whether its networks have gelu, which llama.cpp reads from a table of 16-bit floats on the CPU.
    """

    architecture: str
    keys: Mapping[str, Any]
    tensors: Shapes
    values: Mapping[str, list[float]] = field(default_factory=dict)
    prompt: int = 37
    answer: int = 24
    seed: int = 0
    gelu: bool = False

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit from llama.cpp's, as a part of the spread of all.

        That of a table's number that is rounded the other way is larger than those of sums in fp32.
        """
        return 1e-3 if self.gelu else 3e-5

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.tensors["token_embd.weight"][0]

    @property
    def logit_positions(self) -> list[int]:
        """Positions of the prompt whose logits are kept: the first, one inside a window, the last."""
        return [0, 5, self.prompt - 1]


def shapes(of: Mapping[str, str], sizes: Mapping[str, int], before: str = "", kind: str = "weight") -> Shapes:
    """Return the shapes of named tensors.

    Args:
        of: names and letters, as `ATTENTION` has them.
        sizes: the size that each letter stands for.
        before: what all names begin with.
        kind: what all names end in.
    """
    return {f"{before}{name}.{kind}": tuple(sizes[letter] for letter in letters) for name, letters in of.items()}


def delta_nets(
    layers: int, interval: int, sizes: Mapping[str, int], network: Mapping[str, str] = PLAIN_NETWORK
) -> Shapes:
    """Return the shapes of a model of gated delta nets, with attention in the last layer of each interval."""
    found = shapes(OUTSIDE, sizes)
    for layer in range(layers):
        before = f"blk.{layer}."
        found |= shapes({"attn_norm": "h", "post_attention_norm": "h", **network}, sizes, before)
        if (layer + 1) % interval:
            found |= shapes(DELTA_NET, sizes, before) | shapes({"ssm_dt": "n"}, sizes, before, "bias")
            found[f"{before}ssm_a"] = (sizes["n"],)
        else:
            found |= shapes(GATED_ATTENTION, sizes, before)
    return found


def uniform(layers: int, of_layer: Mapping[str, str], sizes: Mapping[str, int]) -> Shapes:
    """Return the shapes of a model whose layers are alike."""
    found = shapes(OUTSIDE, sizes)
    for layer in range(layers):
        found |= shapes(of_layer, sizes, f"blk.{layer}.")
    return found


def sized(
    layers: int, heads: int, key_heads: int, head: int, hidden: int, network: int, tokens: int
) -> dict[str, Any]:
    """Return the keys that most architectures have."""
    return {
        "vocab_size": tokens,
        "context_length": 512,
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": network,
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }


def weights(name: str, case: Case) -> Weights:
    """Return the weights of a case, fp32 by tensor: matrices around 0, all others as `_around` says."""
    return {
        tensor: np.array(case.values[tensor], dtype=np.float32)
        if tensor in case.values
        else _random(f"{name}/{case.seed}/{tensor}", shape, around=_around(tensor))
        for tensor, shape in case.tensors.items()
    }


def _around(tensor: str) -> float:
    """Return the mean of a vector's numbers: biases are around 0, decays of states negative."""
    if tensor.endswith(".ssm_a"):
        return -0.75
    return 0.0 if tensor.endswith((".bias", ".ffn_gate_inp_shexp.weight")) else 1.0


def _random(seed: str, shape: tuple[int, ...], around: float) -> NDArray[np.float32]:
    data = hashlib.shake_256(seed.encode()).digest(math.prod(shape))
    numbers = np.frombuffer(data, dtype=np.int8).reshape(shape).astype(np.float32)
    if len(shape) == 1:
        vector: NDArray[np.float32] = numbers / np.float32(256) + np.float32(around)
        return vector
    return numbers * np.float32(GAIN / (_BYTE_SPREAD * math.sqrt(shape[-1])))


def checksum(of: Weights) -> str:
    """Return a SHA-256 of names, shapes and numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(of.items()):
        found.update(f"{name} {tensor.shape}\n".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()


def prompt(name: str, case: Case) -> list[int]:
    """Return the tokens of a case's prompt."""
    data = hashlib.shake_256(f"{name}/{case.seed}/prompt".encode()).digest(4 * case.prompt)
    return [int(number) % case.vocabulary for number in np.frombuffer(data, dtype="<u4")]


def write(name: str, case: Case, path: Path) -> str:
    """Write a case as a GGUF file; return the checksum of its weights."""
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in case.keys.items():
        _add(writer, f"{case.architecture}.{key}", value)
    made = weights(name, case)
    for tensor, values in made.items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return checksum(made)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


# heads x size differs from the hidden size, and no vocabulary is a multiple of 64.
_ODD = {"h": 64, "q": 96, "k": 24, "d": 24, "f": 80, "v": 101}
_ODD_KEYS = sized(layers=3, heads=4, key_heads=1, head=24, hidden=64, network=80, tokens=101)
_PAIRS = {"h": 64, "q": 64, "k": 32, "d": 16, "f": 96, "v": 97}
_PAIRS_KEYS = sized(layers=3, heads=4, key_heads=2, head=16, hidden=64, network=96, tokens=97)
_WINDOW = {"attention.sliding_window": 8}
_NETS = _ODD | {"g": 192, "c": 160, "i": 96, "n": 6, "s": 16, "w": 4}
"""Also: two key heads and six value heads of 16, a convolution over four tokens."""
_NETS_KEYS = _ODD_KEYS | {
    "block_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
    "rope.freq_base": 10000000.0,
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 96,
}

CASES: dict[str, Case] = {
    "llama": Case(
        "llama",
        _ODD_KEYS | {"rope.dimension_count": 24, "rope.freq_base": 500000.0},
        uniform(3, ATTENTION | NETWORK, _ODD) | shapes({"output": "vh"}, _ODD) | {"rope_freqs.weight": (12,)},
        values={"rope_freqs.weight": [1.0] * 4 + [1.5, 2.0, 3.0, 5.0] + [8.0] * 4},
    ),
    "qwen2": Case(
        "qwen2",
        _PAIRS_KEYS,
        uniform(3, ATTENTION | NETWORK, _PAIRS)
        | {
            f"blk.{layer}.attn_{part}.bias": (rows,)
            for layer in range(3)
            for part, rows in (("q", 64), ("k", 32), ("v", 32))
        },
    ),
    "qwen3": Case(
        "qwen3",
        _ODD_KEYS | {"rope.freq_base": 1000000.0},
        uniform(3, ATTENTION | NETWORK | HEAD_NORMS, _ODD) | shapes({"output": "vh"}, _ODD),
    ),
    "qwen35": Case(
        "qwen35",
        _NETS_KEYS,
        delta_nets(4, 4, _NETS) | shapes({"output": "vh"}, _NETS),
        prompt=75,
    ),
    "qwen35moe": Case(
        "qwen35moe",
        {key: value for key, value in _NETS_KEYS.items() if key != "feed_forward_length"}
        | {
            "expert_count": 6,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "expert_shared_feed_forward_length": 80,
        },
        delta_nets(4, 4, _NETS | {"e": 6, "m": 48}, SHARED_AND_ROUTED),
        prompt=75,
    ),
    "gemma2": Case(
        "gemma2",
        _ODD_KEYS | _WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        uniform(3, ATTENTION | NETWORK | NORMS_AFTER, _ODD),
        gelu=True,
    ),
    "gemma3": Case(
        "gemma3",
        _ODD_KEYS
        | _WINDOW
        | {
            "block_count": 7,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        uniform(7, ATTENTION | NETWORK | NORMS_AFTER | HEAD_NORMS, _ODD),
        gelu=True,
    ),
}
"""The cases by name."""
