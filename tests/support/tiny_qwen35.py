"""Make tiny random models of Qwen 3.5, and the GGUF files that llama.cpp's converter would make of them.

What differs from other models is written here from the meaning of the converter's steps, head by head, and shares
nothing with the code under test: value heads change places, norms get 1 added, decays are stored as what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiny_models import F16, F32, IN_LAYERS, OUTSIDE, PACKED, Q6_K, Tiny, quantised, read_back

DELTA_NET = {
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 96,  # heads times size is not the hidden size
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.25},
}
"""Four value heads share each key head; a quarter of a head rotates."""


@dataclass(frozen=True)
class TinyQwen35(Tiny):
    """A model to make; see `Tiny`.

    Attributes:
        predicting: blocks of multi-token prediction after the last layer, which only the file has.
    """

    architecture: str = "qwen35"
    kind: str = "qwen3_5_text"
    predicting: int = 0

    def make(self) -> Any:
        """Return the model with random parameters."""
        model = super().make()
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-3.0, 1.0)
            elif name.endswith("linear_attn.norm.weight"):
                parameter.normal_(1.0, 0.3)
            elif name.endswith("conv1d.weight"):
                parameter.normal_(0.0, 0.5)
        return model

    @property
    def is_gemma(self) -> bool:
        """Whether parameters of norms are around 0, as 1 is added to them."""
        return True

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        module, kind = parameter.rsplit(".", 1)
        if module in OUTSIDE:
            return f"{OUTSIDE[module]}.{kind}"
        _, _, layer, inner = parameter.split(".", 3)
        name = DELTA_NET.get(inner) or f"{IN_LAYERS[inner.rsplit('.', 1)[0]]}.{kind}"
        return f"blk.{layer}.{name}"

    def _all_keys(self, config: Any) -> dict[str, Any]:
        keys = super()._all_keys(config) | {
            "block_count": config.num_hidden_layers + self.predicting,
            "rope.dimension_count": int(config.head_dim * 0.25),
            "rope.dimension_sections": [11, 11, 10, 0],
            "rope.freq_base": 3e4,
            "full_attention_interval": 4,
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        }
        keys |= {"nextn_predict_layers": self.predicting} if self.predicting else {}
        return {key: value for key, value in (keys | self.keys).items() if value is not None}

    def _add_tensor(self, writer: Any, parameter: str, values: Tensor, scales: str) -> None:
        name = self.gguf_name(parameter)
        of_layer = name.split(".", 2)[-1] if name.startswith("blk.") else name
        kind = self._type(name, values)
        rows = values.squeeze(1).numpy() if of_layer == "ssm_conv1d.weight" else values.numpy()
        if kind in PACKED:
            if of_layer == "ssm_out.weight":
                # Quantised in the file's order of columns, as the converter moves them first.
                moved = quantised(np.ascontiguousarray(self._tiled(rows, axis=1)), kind)
                values.copy_(torch.from_numpy(self._grouped_columns(read_back(moved, kind, scales).numpy())))
                data = moved
            else:
                data = quantised(rows, kind)
                values.copy_(read_back(data, kind, scales))
                data = self._moved(of_layer, data)
        else:
            dtype = np.float16 if kind == F16 else np.float32
            if of_layer != "ssm_a":
                values.copy_(torch.from_numpy(rows.astype(dtype).astype(np.float32)).view(values.shape))
            data = -np.exp(rows) if of_layer == "ssm_a" else rows.astype(dtype)
            if of_layer.endswith("norm.weight") and of_layer != "ssm_norm.weight":
                data = data + np.float32(1)
            data = self._tiled(data, axis=1) if of_layer == "ssm_out.weight" else self._moved(of_layer, data)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
        if parameter == "model.norm.weight":
            self._add_prediction(writer)

    def _type(self, name: str, values: Tensor) -> Any:
        chosen = next((kind for pattern, kind in self.types.items() if fnmatch(name, pattern)), None)
        if chosen is not None:
            return chosen
        if values.ndim != 2:
            return F32
        return F16 if values.shape[1] % 256 else Q6_K

    def _add_prediction(self, writer: Any) -> None:
        """Add blocks of multi-token prediction: their tensors are nobody's here."""
        layers = {**SIZES, **self.config}["num_hidden_layers"]
        for block in range(layers, layers + self.predicting):
            for name, shape in (("attn_q.weight", (32, 256)), ("nextn.eh_proj.weight", (256, 512))):
                writer.add_tensor(f"blk.{block}.{name}", np.ones(shape, dtype=np.float32))

    def _moved(self, of_layer: str, data: np.ndarray) -> np.ndarray:
        """Return rows in the file's order: those of value heads, at the end, move."""
        if of_layer not in ("attn_qkv.weight", "ssm_conv1d.weight"):
            return self._tiled(data) if of_layer in DELTA_NET.values() and "norm" not in of_layer else data
        config = {**SIZES, **self.config}
        keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
        return np.concatenate([data[:keys], self._tiled(data[keys:])])

    def _tiled(self, data: np.ndarray, axis: int = 0) -> np.ndarray:
        """Put the value heads that share a key head apart: first the first of each key head, then the second."""
        config = {**SIZES, **self.config}
        heads = np.split(data, config["linear_num_value_heads"], axis=axis)
        sharing = config["linear_num_value_heads"] // config["linear_num_key_heads"]
        order = [key * sharing + which for which in range(sharing) for key in range(config["linear_num_key_heads"])]
        return np.concatenate([heads[each] for each in order], axis=axis)

    def _grouped_columns(self, data: np.ndarray) -> np.ndarray:
        """Undo `_tiled` of columns."""
        columns = self._tiled(np.arange(data.shape[1])[None], axis=1)[0]
        grouped = np.empty_like(data)
        grouped[:, columns] = data
        return grouped


MIXTURE = {
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}


@dataclass(frozen=True)
class TinyQwen35Moe(TinyQwen35):
    """A model with routed experts and a shared one, which has a gate of its own; see `Tiny`."""

    architecture: str = "qwen35moe"
    kind: str = "qwen3_5_moe_text"

    def make(self) -> Any:
        """Return the model with random parameters."""
        model = super().make()
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter *= 4  # so that rounding chooses no other expert
        return model

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        inner = parameter.split(".", 3)[-1]
        if inner in MIXTURE:
            return f"blk.{parameter.split('.')[2]}.{MIXTURE[inner]}"
        return super().gguf_name(parameter)

    def _all_keys(self, config: Any) -> dict[str, Any]:
        config.intermediate_size = None
        return super()._all_keys(config) | {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }

    def _add_tensor(self, writer: Any, parameter: str, values: Tensor, scales: str) -> None:
        name = self.gguf_name(parameter)
        if values.ndim < 3 or "conv1d" in name:
            super()._add_tensor(writer, parameter, values, scales)
            return
        data = quantised(values.reshape(-1, values.shape[-1]).numpy(), Q6_K)
        values.copy_(read_back(data, Q6_K, scales).view(values.shape))
        data = data.reshape(*values.shape[:2], -1)
        parts = np.split(data, 2, axis=1) if "gate_up" in name else [data]
        names = [name.replace("gate_up", each) for each in ("gate", "up")] if "gate_up" in name else [name]
        for each, part in zip(names, parts, strict=True):
            writer.add_tensor(each, np.ascontiguousarray(part), raw_dtype=Q6_K)


QWEN35 = TinyQwen35(config=SIZES)
QWEN35_MOE = TinyQwen35Moe(
    config=SIZES
    | {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
    },
    types={"*.ffn_gate_inp.weight": F32, "*.ffn_gate_inp_shexp.weight": F32},
)
