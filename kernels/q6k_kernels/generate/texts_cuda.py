"""The operations of a step of several texts on a GPU: those of a chunk, but for attention and the choice.

Up to 8 texts are multiplied by the kernels of a step (`cuda/decode.cuh`), with activations in 8 bits: norms and
gates then quantise what they compute, as in a step of one text. What attention returns takes a launch for that.
"""

from __future__ import annotations

from torch import Tensor, nn

from q6k_kernels.cuda.decode_plan import TOKENS
from q6k_kernels.cuda.device import Variant
from q6k_kernels.generate import norm_cuda
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed
from q6k_kernels.generate.step_cuda import GATES, gate_variant, macros_of
from q6k_kernels.generate.step_reference import ProductInput
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.models.layer import Activation

_HALVES = nn.Identity()
"""A user of activations in 16 bits."""


class TextKernels(ChunkKernels):
    """The operations of a step of several texts on one GPU, in one dtype; see `ChunkKernels`."""

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]:
        """Launch the residual sum and its norms, see `step_reference`."""
        given = hidden, delta, after, norm, users, factor, scale
        if isinstance(delta, Mixed) or further is not None or not self._coded(users, len(hidden)):
            return super().add_norm(*given, further)
        return self._of_steps.add_norm(*given)

    def gate(self, gate: Tensor, up: Tensor | None, activation: Activation, users: list[nn.Module]) -> ProductInput:
        """Launch the activation function of `gate` times `up`, see `step_reference`."""
        if not self._coded(users, len(gate)):
            return super().gate(gate, up, activation, users)
        return self._of_steps.gate(gate, up, activation, users, len(gate))

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput:
        """Launch rotation, cache write and attention of a token of each text, see `step_reference`."""
        del users
        return self._of_steps.attend(q, k, v, heads, cached, position, [_HALVES])

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Compute a product, (M, N)."""
        if activations.codes is None or not self._coded([module], activations.rows):
            return super().multiply(module, activations)
        return self._of_steps.multiply(module, activations)

    def choose_of_texts(self, logits: Tensor, softcap: float | None, choice: TextsChoice) -> None:
        """Launch the choice of the next tokens."""
        self._of_steps.choose_of_texts(logits, softcap, choice)

    def _coded(self, users: list[nn.Module], rows: int) -> bool:
        """Check whether products of so many rows take activations in 8 bits."""
        return any(self._of_steps.takes_codes(user, rows) for user in users)


def variants() -> list[Variant]:
    """Return all kernels that a step of several texts may load on a GPU, besides those of steps and chunks."""
    found = list[Variant]()
    for fp16 in (0, 1):
        for tokens in TOKENS[1:]:
            macros = macros_of(fp16, tokens)
            found += [gate_variant(macros, GATES[name]) for name in ("silu", "gelu_tanh", "relu_squared")]
            found += [each for each in norm_cuda.variants(macros) if each[1] == norm_cuda.ADD_NORM]
    return found
