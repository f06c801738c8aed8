"""What a pass through a model asks of the operations that compute it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed, Mixture
from q6k_kernels.generate.step_reference import ProductInput, TokenChoice
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.models.layer import Activation


class StepOperations(Protocol):
    """The operations of a pass: `step_reference.TorchOperations` specifies them, `step_cuda.Kernels` is fast."""

    def supports(self, hidden: int, between: int, heads: Heads | DeltaHeads) -> str: ...  # noqa: D102
    def reserve(self, heads: Heads | DeltaHeads) -> None: ...  # noqa: D102
    def add_norm(  # noqa: D102
        self,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]: ...
    def gate(  # noqa: D102
        self, gate: Tensor, up: Tensor | None, activation: Activation, users: list[nn.Module]
    ) -> ProductInput: ...
    def attend(  # noqa: D102
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput: ...
    def delta(  # noqa: D102
        self,
        mixed: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        heads: DeltaHeads,
        states: tuple[Tensor, Tensor],
        users: list[nn.Module],
    ) -> ProductInput: ...
    def supports_mixture(self, mixture: Mixture) -> str: ...  # noqa: D102
    def route(self, x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def mix(  # noqa: D102
        self, x: Tensor, mixture: Mixture, chosen: Tensor, factors: Tensor, beside: Tensor | None
    ) -> Mixed: ...
    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor: ...  # noqa: D102
    def choose(self, logits: Tensor, softcap: float | None, choice: TokenChoice) -> None: ...  # noqa: D102
    def choose_of_texts(self, logits: Tensor, softcap: float | None, choice: TextsChoice) -> None: ...  # noqa: D102
