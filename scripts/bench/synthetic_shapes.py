"""The shapes of models with random weights: sizes, and the tensors that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import gguf
import numpy as np
import numpy.typing as npt

from q6k_kernels.models.architecture import SLIDING
from q6k_kernels.models.cache_layout import holds_codes

Vectors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """A model of the architecture llama, or of gemma3 or gemma4: head and embedding tied, windows in most layers.

    Attributes:
        name: name of the shape.
        hidden, feed_forward: widths, the first a multiple of 256, the second of 32.
        heads, kv_heads: numbers of attention heads, each `head_dim` wide.
        context: largest number of positions.
        theta: base of the rotary embeddings.
        window: positions that most layers of gemma3 and gemma4 see, or 0 for llama.
        wide: number and size of the key heads in layers of gemma4 without a window, whose keys are values too.
        experts: number of experts beside each network, how many of them a token has, and their width.
    """

    name: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int = 8192
    theta: float = 500_000.0
    window: int = 0
    wide: tuple[int, int] | None = None
    experts: tuple[int, int, int] | None = None

    def with_layers(self, layers: int) -> Shape:
        """Return the same shape with another number of layers."""
        return replace(self, layers=layers)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (N, K) of all weights that a token is multiplied with, by GGUF name."""
        found = dict[str, tuple[int, int]]()
        for layer, (kv_heads, size) in enumerate(self.key_heads):
            q, kv = self.heads * size, kv_heads * size
            of_layer = {
                "attn_q": (q, self.hidden),
                "attn_k": (kv, self.hidden),
                "attn_v": (kv, self.hidden),
                "attn_output": (self.hidden, q),
                "ffn_gate": (self.feed_forward, self.hidden),
                "ffn_up": (self.feed_forward, self.hidden),
                "ffn_down": (self.hidden, self.feed_forward),
            }
            if self.wide and self.windows[layer] is None:
                del of_layer["attn_v"]
            found |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return found | {self.head: (self.vocabulary, self.hidden)}

    @property
    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """Return the shapes (E, N, K) of the stacks of experts, by GGUF name."""
        if self.experts is None:
            return {}
        count, _, width = self.experts
        of_layer = {
            "ffn_gate_up_exps": (count, 2 * width, self.hidden),
            "ffn_down_exps": (count, self.hidden, width),
        }
        return {f"blk.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in of_layer.items()}

    @property
    def multiplied(self) -> int:
        """Number of weights that a token is multiplied with: those of its experts only."""
        dense = sum(n * k for n, k in self.linears.values())
        top = self.experts[1] if self.experts else 0
        return dense + sum(top * n * k for _, n, k in self.stacks.values())

    @property
    def key_heads(self) -> list[tuple[int, int]]:
        """Number and size of the key heads of each layer."""
        usual = self.kv_heads, self.head_dim
        return [self.wide if self.wide and window is None else usual for window in self.windows]

    @property
    def gemma(self) -> bool:
        """Whether the architecture is gemma3 or gemma4."""
        return self.window > 0

    @property
    def architecture(self) -> str:
        """Name of the architecture in GGUF."""
        return "gemma4" if self.wide else "gemma3" if self.gemma else "llama"

    @property
    def head(self) -> str:
        """GGUF name of the head's weight."""
        return "token_embd.weight" if self.gemma else "output.weight"

    @property
    def norms(self) -> dict[str, int]:
        """Widths of the norm weights, by GGUF name."""
        found = {"output_norm.weight": self.hidden}
        for layer, (_, size) in enumerate(self.key_heads):
            of_layer = {"attn_norm": self.hidden, "ffn_norm": self.hidden}
            if self.gemma:
                of_layer |= {"post_attention_norm": self.hidden, "post_ffw_norm": self.hidden}
                of_layer |= {"attn_q_norm": size, "attn_k_norm": size}
            if self.experts:
                of_layer |= dict.fromkeys(("post_ffw_norm_1", "post_ffw_norm_2", "pre_ffw_norm_2"), self.hidden)
            found |= {f"blk.{layer}.{name}.weight": width for name, width in of_layer.items()}
        return found

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees, or None for all: every sixth layer of a gemma sees all."""
        return [self.window if self.gemma and (i + 1) % 6 else None for i in range(self.layers)]

    @property
    def vectors(self) -> Vectors:
        """Numbers that only this architecture has, and that are not packed, by GGUF name: none."""
        return {}

    @property
    def rotated(self) -> int:
        """Values of a head that rotate."""
        return self.head_dim

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the keys that only this architecture has: none."""

    def kv_bytes(self, positions: float, *, codes: bool = False) -> float:
        """Return the bytes of the keys and values that a token after so many positions needs.

        A number has 16 bits, or with `codes`, where a cache has them, 8 and a scale of 32 for each head.
        """
        found = 0.0
        for window, (heads, size) in zip(self.windows, self.key_heads, strict=True):
            coded = codes and (window is None or holds_codes(SLIDING, window))
            seen = positions if window is None else min(positions, window)
            found += 2 * seen * heads * (size + 4 if coded else size * 2)
        return found


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", 16, 2048, 8192, 32, 8, 64, 128256),
        Shape("llama-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("gemma-27b", 62, 5376, 21504, 32, 16, 128, 262144, 131072, 1_000_000.0, window=1024),
        Shape(
            *("gemma4-31b", 60, 5376, 21504, 32, 16, 256, 262144, 262144, 1_000_000.0), window=1024, wide=(4, 512)
        ),
        Shape(
            "gemma4-26b-a4b", 30, 2816, 2112, 16, 8, 256, 262144, 262144, 1_000_000.0, 1024, (2, 512), (128, 8, 704)
        ),
        Shape("tiny", 2, 256, 512, 4, 2, 64, 512),
        Shape("tiny-gemma", 7, 256, 512, 4, 2, 64, 512, 1024, 1_000_000.0, window=16),
        Shape("tiny-gemma4", 6, 256, 512, 4, 2, 64, 512, 1024, 1_000_000.0, window=16, wide=(1, 128)),
        Shape("tiny-gemma4-experts", 6, 256, 512, 4, 2, 64, 512, 1024, 1_000_000.0, 16, (1, 128), (8, 2, 256)),
    )
}
"""Shapes by name: Llama 3.2 1B, 3.1 8B, Gemma 3 27B, Gemma 4 31B, 26B-A4B, and tiny ones for a quick look."""
