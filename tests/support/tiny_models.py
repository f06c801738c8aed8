"""Make tiny random models of transformers, and the GGUF files that llama.cpp's converter would make of them.

The converter's changes of names, rows, norms and keys are written here from its documentation and its source,
`convert_hf_to_gguf.py`, and share nothing with the code under test. ggml itself (`libgguf`) quantises the weights.
The model's own weights are then set to those of the file, so that both compute the same.
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options

Q6_K, Q8_0, Q3_K, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q6_K", "Q8_0", "Q3_K", "F16", "F32"))
PACKED = (Q6_K, Q8_0)
"""Those of them that a bundle keeps packed."""
SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IN_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
NORMS = {
    False: {"post_attention_layernorm": "ffn_norm"},
    True: {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


PERMUTED = ("llama", "mistral", "mistral3", "internlm2", "smollm3", "arcee", "granite")
"""Architectures whose rows of q and k the converter permutes."""


@dataclass(frozen=True)
class Tiny:
    """A model to make.

    Attributes:
        architecture: name of the architecture in GGUF.
        kind: name of the architecture in transformers.
        config: fields of its configuration besides `SIZES`.
        keys: metadata keys without `ARCHITECTURE.`, besides those that every model has; None removes one.
        types: tensor types by patterns of GGUF names; the default is Q6_K wherever it is possible.
        freqs: values of `rope_freqs.weight`.
        factors: values of further tensors, by name.
        names: names of tensors, by modules of a layer, where they are others than Llama's or Gemma's.
        without: patterns of biases that the model does not have, though its class has.
    """

    architecture: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    types: dict[str, Any] = field(default_factory=dict)
    freqs: list[float] | None = None
    factors: dict[str, list[float]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    seed: int = 0

    @property
    def is_gemma(self) -> bool:
        """Whether the model has Gemma's norms: more of them, and with 1 added."""
        return self.architecture.startswith("gemma")

    @property
    def is_llama(self) -> bool:
        """Whether the rows of q and k are permuted."""
        return self.architecture in PERMUTED

    def make(self) -> Any:
        """Return the model with random parameters."""
        torch.manual_seed(self.seed)
        layers = {"num_hidden_layers": 2}
        config = AutoConfig.for_model(self.kind, **{**SIZES, **layers, **self.config})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if any(fnmatch(f"{name}.bias", pattern) for pattern in self.without):
                module.bias = None
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("norm.weight") and not self.is_gemma else 0.0
            parameter.normal_(around, 0.3 if parameter.ndim == 1 else 0.06)
        return model

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        module, kind = parameter.rsplit(".", 1)
        if module in OUTSIDE:
            return f"{OUTSIDE[module]}.{kind}"
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{(IN_LAYERS | NORMS[self.is_gemma] | self.names)[inner]}.{kind}"

    def bundle(self, directory: Path, scales: str = "exact", other: str = "bf16") -> tuple[Path, Any]:
        """Return the bundle, and the model with the weights of the bundle; both are made once, and copied."""
        key = f"{self!r} {scales} {other}"
        if key not in _BUNDLES:
            folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
            _BUNDLES[key] = folder, self.write(folder, scales, other)
        made, model = _BUNDLES[key]
        shutil.copytree(made, directory, dirs_exist_ok=True)
        torch.manual_seed(self.seed)  # what tests draw does not depend on who was first
        return directory / "out", copy.deepcopy(model)

    def write(self, directory: Path, scales: str = "exact", other: str = "bf16") -> Any:
        """Write `model.gguf` and `out`, and return the model."""
        model = self.make()
        writer = gguf.GGUFWriter(directory / "model.gguf", self.architecture)
        for key, value in self._all_keys(model.config).items():
            _add(writer, key if key.startswith("tokenizer.") else f"{self.architecture}.{key}", value)
        for name, parameter in model.state_dict(keep_vars=True).items():
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                self._add_tensor(writer, name, parameter, scales)
        if self.freqs is not None:
            writer.add_tensor("rope_freqs.weight", np.array(self.freqs, dtype=np.float32))
        for name, values in self.factors.items():
            writer.add_tensor(name, np.array(values, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        convert(directory / "model.gguf", directory / "out", Options(scales=scales, other=other))  # type: ignore[arg-type]
        return model

    def _all_keys(self, config: Any) -> dict[str, Any]:
        keys = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 0.0)),
            "tokenizer.ggml.bos_token_id": config.bos_token_id,
            "tokenizer.ggml.eos_token_id": config.eos_token_id,
            "tokenizer.ggml.padding_token_id": config.pad_token_id,
        }
        if self.is_llama:
            keys |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
        if self.kind != "qwen2":
            keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
        return {key: value for key, value in (keys | self.keys).items() if value is not None}

    def _add_tensor(self, writer: Any, parameter: str, values: Tensor, scales: str) -> None:
        name = self.gguf_name(parameter)
        kind = next((kind for pattern, kind in self.types.items() if fnmatch(name, pattern)), None)
        if kind is None:
            kind = F32 if values.ndim == 1 else F16 if values.shape[1] % 256 else Q6_K
        rows = values.numpy()
        if kind in (*PACKED, Q3_K):
            data = quantised(rows, kind)
            values.copy_(read_back(data, kind, scales))
        else:
            data = rows.astype(np.float16 if kind == F16 else np.float32)
            values.copy_(torch.from_numpy(data.astype(np.float32)))
            if self.is_gemma and name.endswith("norm.weight"):
                data = data + np.float32(1)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        if self.is_llama and heads:
            data = permuted(data, {**SIZES, **self.config}[heads])
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)


def add_stack(writer: Any, names: list[str], stack: Tensor, scales: str, kind: Any = Q6_K) -> None:
    """Add the weights of experts (E, N, K) to a file, in equal parts along N if there are several names.

    The weights become those that the bundle will hold.
    """
    rows = stack.reshape(-1, stack.shape[-1]).numpy()
    data = quantised(rows, kind)
    stack.copy_(read_back(data, kind, scales).view(stack.shape))
    parts = np.split(data.reshape(*stack.shape[:2], -1), len(names), axis=1)
    for name, part in zip(names, parts, strict=True):
        writer.add_tensor(name, np.ascontiguousarray(part), raw_dtype=kind)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows like the converter's `permute`: alternate the rows of the two halves of each head."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def quantised(rows: np.ndarray, kind: Any) -> np.ndarray:
    """Quantise rows with ggml to blocks, uint8 (N, bytes of a row); cached, as tests share weights."""
    key = hashlib.sha256(rows.tobytes()).digest(), rows.shape, int(kind)
    if key not in _QUANTISED:
        blocks = np.frombuffer(libgguf.quantize_rows(rows, int(kind)), dtype=np.uint8)
        _QUANTISED[key] = blocks.reshape(len(rows), -1)
    return _QUANTISED[key]


_QUANTISED: dict[Any, np.ndarray] = {}
_BUNDLES: dict[str, tuple[Path, Any]] = {}
_FOLDER = tempfile.TemporaryDirectory(prefix="q6k-tiny-")


def read_back(blocks: np.ndarray, kind: Any, scales: str) -> Tensor:
    """Return the weights that a bundle holds for quantised rows, in fp32."""
    exact = torch.from_numpy(gguf.dequantize(blocks, kind))
    if kind not in PACKED:
        return exact.bfloat16().float()
    if kind != Q6_K or scales == "exact":
        return exact
    # The last 18 bytes of each block are 16 sub-scales and d.
    each = blocks.reshape(-1, 210)
    d = torch.from_numpy(each[:, 208:].copy().view(np.float16).astype(np.float32))
    products = (d * torch.from_numpy(each[:, 192:208].copy().view(np.int8).astype(np.float32))).view(-1, 1)
    groups = exact.view(-1, 16)
    codes = torch.where(products == 0, 0.0, groups / products)
    return (codes * products.bfloat16().float()).view(exact.shape)


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, context: int
) -> list[float]:
    """Return `rope_freqs.weight` as the converter computes it for Llama 3.1."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
