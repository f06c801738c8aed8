"""Make a tiny random gpt-oss, and the GGUF file that llama.cpp's converter would make of it, with MXFP4 experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tiny_models import F32, IN_LAYERS, OUTSIDE, Tiny, quantised, read_back

MXFP4 = gguf.GGMLQuantizationType.MXFP4
OF_LAYER = {
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
}
"""Parameters of a layer -> names in GGUF, besides those that other models have; gate and up are two tensors."""


@dataclass(frozen=True)
class TinyGptOss(Tiny):
    """A model to make; see `Tiny`."""

    def make(self) -> Any:
        """Return the model with random parameters."""
        model = super().make()
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter *= 4  # so that rounding chooses no other expert
            if "experts" in name:
                parameter *= 4  # so that gates reach their bounds
        return model

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        module, kind = parameter.rsplit(".", 1)
        if module in OUTSIDE:
            return f"{OUTSIDE[module]}.{kind}"
        _, _, layer, inner = parameter.split(".", 3)
        name = OF_LAYER.get(inner) or f"{IN_LAYERS[inner.rsplit('.', 1)[0]]}.{kind}"
        return f"blk.{layer}.{name}"

    def _add_tensor(self, writer: Any, parameter: str, values: Tensor, scales: str) -> None:
        if "experts" not in parameter:
            super()._add_tensor(writer, parameter, values, scales)
        elif "gate_up_proj" in parameter:
            layer, kind = parameter.split(".")[2], "bias" if parameter.endswith("bias") else "weight"
            for part, columns in (("gate", values[..., ::2]), ("up", values[..., 1::2])):
                self._add_experts(writer, f"blk.{layer}.ffn_{part}_exps.{kind}", columns)
        else:
            self._add_experts(writer, self.gguf_name(parameter), values)

    def _add_experts(self, writer: Any, name: str, values: Tensor) -> None:
        if name.endswith("bias"):
            writer.add_tensor(name, np.ascontiguousarray(values.numpy()), raw_dtype=F32)
            return
        stack = values.transpose(1, 2).contiguous()
        kind = self.types.get(name, MXFP4)
        blocks = quantised(stack.view(-1, stack.shape[-1]).numpy(), kind)
        exact = (
            torch.from_numpy(gguf.dequantize(blocks, kind)) if kind == MXFP4 else read_back(blocks, kind, "exact")
        )
        values.copy_(exact.view(stack.shape).transpose(1, 2))
        writer.add_tensor(name, blocks.reshape(*stack.shape[:2], -1), raw_dtype=kind)

    def _all_keys(self, config: Any) -> dict[str, Any]:
        own = {
            "attention.sliding_window": config.sliding_window,
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.intermediate_size,
        }
        return own | super()._all_keys(config)  # those of a test replace the model's


ROUTER = {"*ffn_gate_inp.weight": F32}
GPT_OSS = TinyGptOss(
    "gpt-oss",
    "gpt_oss",
    {
        "hidden_size": 288,  # no multiple of 256, as 2880 is none
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    {
        "rope.freq_base": 1.5e5,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    },
    ROUTER,
)
