"""States of recurrent layers (gated delta nets), in buffers that never move, and earlier ones to go back to.

A layer's states are the last inputs of its convolution and a matrix for each value head. Every token replaces them,
so unlike keys and values they cannot be undone. Yet steps run in vain: a stop token is seen only a few steps late.
So every `SLACK` positions the states are copied, and the two latest copies are kept. At most `SLACK` steps run in
vain, so the older copy at least is of the text that goes on; the tokens from there run again. One more copy, from
near the end of the last prompt, lasts until the next one: a chat's next turn may write the answer in another way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from q6k_kernels.models.cache_layout import SLACK, STATE_COPIES, state_sizes


@dataclass
class LayerStates:
    """The states of one layer, as transformers' layers look for them from 5.17 on.

    Attributes:
        conv_states: at 0 the last inputs of the convolution, (1, channels, kernel size) in the model's dtype.
        recurrent_states: at 0 the matrices, float32 (1, value heads, key size, value size).
        record_past: transformers' name for keeping more; never done here.
    """

    conv_states: dict[int, Tensor | None] = field(default_factory=lambda: {0: None}, repr=False)
    recurrent_states: dict[int, Tensor | None] = field(default_factory=lambda: {0: None}, repr=False)
    record_past: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """The states that exist: none before the first token."""
        found = (self.conv_states[0], self.recurrent_states[0])
        return [tensor for tensor in found if tensor is not None]


@dataclass
class _Copy:
    position: int
    tensors: list[Tensor] = field(repr=False)
    lasting: bool = False


class RecurrentStates:
    """The states of all recurrent layers of a model.

    Attributes:
        layers: the states by index of the layer.
        position: the position of the next token, as of the last forward pass or step that was started.

    Args:
        config: configuration of a transformers model.
        layers: indices of its recurrent layers.
        device: device of the states.
    """

    def __init__(self, config: Any, layers: list[int], device: torch.device) -> None:
        self.layers = {layer: LayerStates() for layer in layers}
        self.position = 0
        self._device = device
        self._shapes = state_sizes(config) if layers else None
        self._copies = list[_Copy]()
        self._free = list[list[Tensor]]()

    @property
    def tensors(self) -> list[Tensor]:
        """All states of all layers."""
        return [tensor for layer in self.layers.values() for tensor in layer.tensors]

    @property
    def nbytes(self) -> int:
        """Size of all states and their copies in bytes; 0 before the first token."""
        copies = [*(copy.tensors for copy in self._copies), *self._free]
        return sum(tensor.nbytes for tensors in (self.tensors, *copies) for tensor in tensors)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's last inputs of the convolution and its matrices.

        Raises:
            RuntimeError: no prompt has gone through the model yet.
        """
        if not (tensors := self.layers[layer].tensors):
            raise RuntimeError(f"layer {layer} has no state yet: run a prompt through the model first")
        return tensors[0], tensors[1]

    def allocate(self, dtype: torch.dtype) -> None:
        """Allocate all states and copies, if there are none yet; `dtype` is the model's."""
        if self._shapes is None or self.tensors:
            return
        convolution, state = self._shapes
        for layer in self.layers.values():
            layer.conv_states[0] = torch.zeros(1, *convolution, dtype=dtype, device=self._device)
            layer.recurrent_states[0] = torch.zeros(1, *state, dtype=torch.float32, device=self._device)
        self._free = [[torch.zeros_like(each) for each in self.tensors] for _ in range(STATE_COPIES)]

    def clear(self) -> None:
        """Make the states those before the first token."""
        if self.tensors:
            torch._foreach_zero_(self.tensors)

    def save(self, position: int, *, lasting: bool = False) -> None:
        """Copy the states, which are those before the token at `position`, unless the latest copy is recent.

        Args:
            position: position of the next token.
            lasting: whether to copy them in any case, and to keep the copy until the next lasting one.
        """
        # Copies of later positions are of a text that did not go on.
        self._release([copy for copy in self._copies if copy.position > position])
        if not position or not self.tensors:
            return
        for copy in self._copies if lasting else ():
            copy.lasting = False
        latest = self._copies[-1] if self._copies else None
        if latest is None or position - latest.position >= (1 if lasting else SLACK):
            if not self._free:
                self._release([copy for copy in self._copies if not copy.lasting][:1])
            latest = _Copy(position, self._free.pop())
            torch._foreach_copy_(latest.tensors, self.tensors)
            self._copies.append(latest)
        latest.lasting |= lasting

    def rewind(self, position: int) -> int:
        """Go back to the states before the token at `position` or earlier; return where the text has to go on."""
        if not self.layers or position == self.position:
            return position
        self._release([copy for copy in self._copies if copy.position > position])
        if not self._copies:
            return 0
        torch._foreach_copy_(self.tensors, self._copies[-1].tensors)
        self.position = self._copies[-1].position
        return self.position

    def forget(self) -> None:
        """Forget the text; keep the memory."""
        self._release(list(self._copies))
        self.position = 0

    def update_convolution(self, layer: int, new: Tensor, *, first: bool) -> Tensor:
        """Store the inputs of a convolution, (1, channels, length); return them after those that they follow.

        Args:
            layer: index of the layer.
            new: the inputs.
            first: whether they begin the text.
        """
        kept = self.layers[layer].conv_states[0]
        assert kept is not None  # noqa: S101 -- `allocate` has made it
        size = kept.shape[-1]
        seen = pad(new, (max(0, size - new.shape[-1]), 0)) if first else torch.cat([kept, new], dim=-1)
        kept.copy_(seen[..., -size:])
        return seen

    def update_matrices(self, layer: int, new: Tensor) -> Tensor:
        """Store the matrices of a layer, (1, value heads, key size, value size)."""
        kept = self.layers[layer].recurrent_states[0]
        assert kept is not None  # noqa: S101 -- `allocate` has made it
        return kept.copy_(new)

    def _release(self, copies: list[_Copy]) -> None:
        self._free += [copy.tensors for copy in copies]
        self._copies = [copy for copy in self._copies if all(copy is not each for each in copies)]
