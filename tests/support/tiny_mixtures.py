"""Make tiny random models of Qwen 3 with experts, and the GGUF files that the converter of llama.cpp would make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tiny_models import F32, Q6_K, Tiny, add_stack

ROUTER = "mlp.gate.weight"
STACKS = {"gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "down_proj": ("ffn_down_exps.weight",)}
"""Parameters of experts -> their tensors in GGUF."""


@dataclass(frozen=True)
class TinyMixture(Tiny):
    """A model to make; see `Tiny`. Its files have the experts' gate and up in two stacks."""

    architecture: str = "qwen3moe"
    kind: str = "qwen3_moe"

    def make(self) -> Any:
        """Return the model with random parameters."""
        model = super().make()
        for name, parameter in model.named_parameters():
            if name.endswith(ROUTER):
                parameter *= 20  # so that rounding chooses no other expert
        return model

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        if parameter.endswith(ROUTER):
            return f"blk.{parameter.split('.')[2]}.ffn_gate_inp.weight"
        return super().gguf_name(parameter)

    def _add_tensor(self, writer: Any, parameter: str, values: Tensor, scales: str) -> None:
        if values.ndim < 3:
            super()._add_tensor(writer, parameter, values, scales)
            return
        layer, stack = parameter.split(".")[2], parameter.rpartition(".")[2]
        add_stack(writer, [f"blk.{layer}.{name}" for name in STACKS[stack]], values, scales, Q6_K)

    def _all_keys(self, config: Any) -> dict[str, Any]:
        keys = super()._all_keys(config) | {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
        return {key: value for key, value in (keys | self.keys).items() if value is not None}


QWEN3MOE = TinyMixture(
    config={"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 256, "norm_topk_prob": True},
    types={"*.ffn_gate_inp.weight": F32},
)
