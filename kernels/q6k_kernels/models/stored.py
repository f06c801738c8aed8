"""How a file stores tensors, where it differs from transformers' parameters: order of rows and inputs, and values.

Rows move in packed form, so no value changes. Inputs cannot, as weights of a group share a scale: there the
activations move (`fusing.ReorderedInput`). Functions are module-level ones, as models are pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Order = Callable[[Any, int], "Tensor | None"]
"""Returns, for a model's configuration and a number of rows, an index for each row, int64 on the CPU; None if the
order is the same."""


@dataclass(frozen=True)
class Stored:
    """A kind of tensor that is stored differently.

    Attributes:
        rows: the file's row for each of transformers'; None if the order is the same.
        inputs: transformers' input for each of the file's, the columns of a matrix; None if the order is the same.
        values: computes the parameter from the file's numbers, both fp32; None if they are equal.
        wide: whether the parameter stays in fp32, whatever the model's dtype.
        layered: the dimension that has a part for each layer of the model; None if there is none.
    """

    rows: Order | None = None
    inputs: Order | None = None
    values: Callable[[Tensor], Tensor] | None = None
    wide: bool = False
    layered: int | None = None

    def of_model(self, shape: tuple[int, ...], sampled: int, layers: int) -> tuple[int, ...]:
        """Return the shape of a parameter of a model of so many layers, given that of a sample of it."""
        return tuple(size // sampled * layers if at == self.layered else size for at, size in enumerate(shape))


AS_IT_IS = Stored()


def row_order(rows: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return the GGUF row of each transformers row of q or k in a llama file, int64 (rows,).

    Rotary embeddings rotate pairs of rows. llama.cpp stores the two rows of a pair side by side, transformers half
    a head apart: row (head, half, pair) of transformers is row (head, pair, half) of GGUF.

    Args:
        rows: number of rows, a multiple of `head_dim`.
        head_dim: rows of a head, an even number.
        device: device of the result; the CPU by default.
    """
    import torch  # imported here: the size of a cache is told without it

    return torch.arange(rows, device=device).view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _interleaved(config: Any, rows: int) -> Tensor:
    return row_order(rows, config.head_dim)


INTERLEAVED = Stored(rows=_interleaved)
"""The rows of q and k of a llama file."""
INTERLEAVED_HEADS = {f"attn_{each}.{kind}": INTERLEAVED for each in "qk" for kind in ("weight", "bias")}
"""`Architecture.stored` of files whose q and k are like a llama file's."""
SEPARATE = {
    "mlp.experts.gate_up_proj": "mlp.experts.gate_proj.weight",
    "mlp.experts.down_proj": "mlp.experts.down_proj.weight",
}
"""`Architecture.renamed` of models of which the `gguf` package knows gate and up apart only."""
