"""Shapes of gpt-oss: sinks, windows in every other layer, and experts with biases in place of networks."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np

import synthetic_qwen
from synthetic_shapes import Shape, Vectors


@dataclass(frozen=True)
class GptOssShape(Shape):
    """A model of the architecture gpt-oss; `feed_forward` is the width of an expert."""

    @property
    def architecture(self) -> str:
        """Name of the architecture in GGUF."""
        return "gpt-oss"

    @property
    def gemma(self) -> bool:
        """Whether the architecture is gemma3 or gemma4: neither, though layers have windows."""
        return False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (N, K) of all weights that a token is multiplied with, by GGUF name."""
        return {name: shape for name, shape in super().linears.items() if "ffn" not in name}

    @property
    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """Return the shapes (E, N, K) of the stacks of experts, by GGUF name."""
        assert self.experts is not None  # noqa: S101 -- all shapes have them
        count, _, width = self.experts
        of_layer = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (count, width, self.hidden))
        of_layer["ffn_down_exps"] = (count, self.hidden, width)
        return {f"blk.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in of_layer.items()}

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees, or None for all."""
        return [None if layer % 2 else self.window for layer in range(self.layers)]

    @property
    def norms(self) -> dict[str, int]:
        """Widths of the norm weights, by GGUF name."""
        names = [f"blk.{i}.{name}" for i in range(self.layers) for name in ("attn_norm", "post_attention_norm")]
        return {f"{name}.weight": self.hidden for name in ("output_norm", *names)}

    @property
    def vectors(self) -> Vectors:
        """Numbers that only this architecture has, and that are not packed, by GGUF name."""
        random, found = np.random.default_rng(2), Vectors()
        matrices = {name: rows for name, (*rows, _) in {**self.linears, **self.stacks}.items() if name != self.head}
        for name, rows in matrices.items():
            found[name.replace(".weight", ".bias")] = random.normal(0, 0.02, rows).astype(np.float32)
        assert self.experts is not None  # noqa: S101 -- as above
        for layer in range(self.layers):
            shapes = {
                "attn_sinks.weight": (self.heads,),
                "ffn_gate_inp.weight": (self.experts[0], self.hidden),
                "ffn_gate_inp.bias": (self.experts[0],),
            }
            for name, shape in shapes.items():
                found[f"blk.{layer}.{name}"] = random.normal(0, 0.05, shape).astype(np.float32)
        return found

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the keys that only this architecture has."""
        writer.add_sliding_window(self.window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)


SHAPES: dict[str, Shape] = synthetic_qwen.SHAPES | {
    shape.name: shape
    for shape in (
        GptOssShape(
            "gpt-oss-20b", 24, 2880, 2880, 64, 8, 64, 201088, 131072, 150_000.0, 128, experts=(32, 4, 2880)
        ),
        GptOssShape("tiny-gpt-oss", 2, 288, 96, 4, 2, 64, 512, 1024, 150_000.0, 16, experts=(8, 2, 96)),
    )
}
"""The shapes of `synthetic_qwen`, gpt-oss 20B, and a tiny one for a quick look."""
