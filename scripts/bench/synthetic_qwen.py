"""Shapes of Qwen 3.5 and 3.6: gated delta nets, attention in every fourth layer, and experts."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np

import synthetic_shapes
from synthetic_shapes import Shape, Vectors

STATE, TAPS, INTERVAL = 128, 4, 4
"""Size of a head of the delta nets, tokens of their convolution, and layers up to each with attention."""


@dataclass(frozen=True)
class QwenShape(Shape):
    """A model of the architecture qwen35, or of qwen35moe.

    Attributes:
        state_heads: numbers of key heads and of value heads of the delta nets.
    """

    state_heads: tuple[int, int] = (16, 32)

    @property
    def architecture(self) -> str:
        """Name of the architecture in GGUF."""
        return "qwen35moe" if self.experts else "qwen35"

    @property
    def head(self) -> str:
        """GGUF name of the head's weight."""
        return "output.weight"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (N, K) of all weights that a token is multiplied with, by GGUF name."""
        found, width, hidden = dict[str, tuple[int, int]](), self.feed_forward, self.hidden
        key_heads, value_heads = self.state_heads
        values, q, kv = value_heads * STATE, self.heads * self.head_dim, self.kv_heads * self.head_dim
        for layer, window in enumerate(self.windows):
            of_layer = {
                "attn_qkv": (2 * key_heads * STATE + values, hidden),
                "attn_gate": (values, hidden),
                "ssm_alpha": (value_heads, hidden),
                "ssm_beta": (value_heads, hidden),
                "ssm_out": (hidden, values),
            }
            if window is None:
                of_layer = {"attn_q": (2 * q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
                of_layer["attn_output"] = (hidden, q)
            suffix = "_shexp" if self.experts else ""
            of_layer |= {f"ffn_{part}{suffix}": (width, hidden) for part in ("gate", "up")}
            of_layer[f"ffn_down{suffix}"] = (hidden, width)
            found |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return found | {self.head: (self.vocabulary, hidden)}

    @property
    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """Return the shapes (E, N, K) of the stacks of experts, by GGUF name."""
        if self.experts is None:
            return {}
        count, _, width = self.experts
        of_layer = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (count, width, self.hidden))
        of_layer["ffn_down_exps"] = (count, self.hidden, width)
        return {f"blk.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in of_layer.items()}

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees, or None for all; delta nets see none."""
        return [0 if (layer + 1) % INTERVAL else None for layer in range(self.layers)]

    @property
    def rotated(self) -> int:
        """Values of a head that rotate."""
        return self.head_dim // 4

    @property
    def norms(self) -> dict[str, int]:
        """Widths of the norm weights, by GGUF name."""
        found = {"output_norm.weight": self.hidden}
        for layer, window in enumerate(self.windows):
            of_layer = {"attn_norm": self.hidden, "post_attention_norm": self.hidden}
            of_heads = {"attn_q_norm": self.head_dim, "attn_k_norm": self.head_dim}
            of_layer |= of_heads if window is None else {"ssm_norm": STATE}
            found |= {f"blk.{layer}.{name}.weight": width for name, width in of_layer.items()}
        return found

    @property
    def vectors(self) -> Vectors:
        """Numbers that only this architecture has, and that are not packed, by GGUF name."""
        random, found = np.random.default_rng(2), Vectors()
        for layer, window in enumerate(self.windows):
            before, (key_heads, value_heads) = f"blk.{layer}.", self.state_heads
            if window is not None:
                channels = (2 * key_heads + value_heads) * STATE
                found[f"{before}ssm_conv1d.weight"] = random.normal(0, 0.5, (channels, TAPS)).astype(np.float32)
                found[f"{before}ssm_a"] = -random.uniform(0.05, 1, value_heads).astype(np.float32)
                found[f"{before}ssm_dt.bias"] = random.normal(0, 1, value_heads).astype(np.float32)
            if self.experts:
                router = random.normal(0, 0.05, (self.experts[0] + 1, self.hidden)).astype(np.float32)
                found[f"{before}ffn_gate_inp.weight"] = router[:-1]
                found[f"{before}ffn_gate_inp_shexp.weight"] = router[-1]
        return found

    def kv_bytes(self, positions: float, *, codes: bool = False) -> float:
        """Return the bytes of keys and values that a token needs, and of states that it reads and writes."""
        states = sum(window is not None for window in self.windows) * self.state_heads[1] * STATE**2
        return super().kv_bytes(positions, codes=codes) + 2 * 4 * states

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the keys that only this architecture has."""
        key_heads, value_heads = self.state_heads
        writer.add_rope_dimension_sections([11, 11, 10, 0])
        writer.add_full_attention_interval(INTERVAL)
        writer.add_ssm_conv_kernel(TAPS)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_group_count(key_heads)
        writer.add_ssm_time_step_rank(value_heads)
        writer.add_ssm_inner_size(value_heads * STATE)
        if self.experts:
            writer.add_expert_shared_feed_forward_length(self.feed_forward)


_THETA, _CONTEXT = 10_000_000.0, 262144
SHAPES: dict[str, Shape] = synthetic_shapes.SHAPES | {
    shape.name: shape
    for shape in (
        QwenShape("qwen35-27b", 64, 5120, 17408, 24, 4, 256, 248320, _CONTEXT, _THETA, state_heads=(16, 48)),
        QwenShape("qwen36-35b-a3b", 40, 2048, 512, 16, 2, 256, 248320, _CONTEXT, _THETA, experts=(256, 8, 512)),
        QwenShape("tiny-qwen", 4, 256, 512, 4, 2, 64, 512, 1024, _THETA, state_heads=(1, 2)),
        QwenShape(
            "tiny-qwen-moe", 4, 256, 256, 4, 2, 64, 512, 1024, _THETA, state_heads=(1, 2), experts=(8, 2, 256)
        ),
    )
}
"""The shapes of `synthetic_shapes`, Qwen3.6-27B, Qwen3.6-35B-A3B, and a tiny one of each for a quick look."""
