"""Keys and values of the tokens so far, in buffers that never move, and the masks of valid slots.

A full attention layer has a slot for every position up to the capacity. A layer with a sliding window has a ring of
R slots: position p lies in slot p mod R. Keys include their position (RoPE), so their order in the ring does not
matter; the mask selects the slots that hold a position of the window. `models.cache_layout` has the sizes: R is the
window plus `SLACK`, so that up to as many steps can be undone.

Each attention layer of a transformers model calls `update`; the masks are passed as `attention_mask`. Recurrent
layers have states instead (see `recurrent`), which transformers' layers reach by other methods. Their names changed
after 5.17, and both are here. Decode reads and writes tensors at fixed addresses, including the position, so it can
be recorded in a CUDA graph.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor

from q6k_kernels.generate.cache_codes import CACHE_TYPES, FEW_SLOTS, CacheType
from q6k_kernels.generate.recurrent import LayerStates, RecurrentStates
from q6k_kernels.models.architecture import FULL, LINEAR, SLIDING
from q6k_kernels.models.cache_layout import aligned, holds_codes, layer_kinds, ring_slots

Masks = Tensor | dict[str, Tensor | None] | None


def cache_argument(model: Any) -> str:
    """Return the name by which the forward pass of a transformers model takes a cache.

    It is `cache` from transformers 5.24 on, which warns of the older name at every call.
    """
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


@dataclass
class _LayerCache:
    kind: str
    slots: int
    keys: Tensor | None = field(default=None, repr=False)
    values: Tensor | None = field(default=None, repr=False)
    scales: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def scales_at(self, place: int) -> tuple[Tensor, Tensor] | None:
        if self.scales is None:
            return None
        of_keys, of_values = self.scales
        return of_keys[place : place + 1], of_values[place : place + 1]


class KeyValueCache:
    """The cache of one text, or places for several.

    Attributes:
        capacity: the most positions of a text.
        slots: slots of full layers, the capacity rounded up.
        position: int64 (places,), the position of each text that the next decoding step writes.
        source: the layer whose keys and values each layer uses, nearly always its own.
        states: the states of recurrent layers.
        written: the end of all positions that were ever written for this text, also by steps that ran in vain.
        cache_type: the numbers that it holds.

    Args:
        config: configuration of a transformers model.
        capacity: positions, 1 or more.
        device: device of the buffers.
        places: the most texts. The states of recurrent layers are of one text only.
        cache_type: the numbers that it holds, see `cache_codes`; with "int8" layers with a short window hold the
            model's, see `cache_layout.holds_codes`. transformers' layers know only the model's.

    Raises:
        UnsupportedModelError: a layer is of none of the kinds that `cache_layout` knows.
        ValueError: there is no such `cache_type`.
    """

    def __init__(
        self,
        config: Any,
        capacity: int,
        device: torch.device,
        places: int = 1,
        cache_type: CacheType = "model",
    ) -> None:
        if cache_type not in CACHE_TYPES:
            raise ValueError(f"cache_type: expected {' or '.join(CACHE_TYPES)}, found {cache_type!r}")
        self.capacity, self.cache_type = capacity, cache_type
        self.device = device
        self._places = places
        self.position = torch.zeros(places, dtype=torch.int64, device=device)
        self.written = 0
        self.kinds = layer_kinds(config)
        self.window = int(config.sliding_window) if SLIDING in self.kinds else 0
        self.slots = aligned(capacity)
        self.ring = ring_slots(self.window, capacity)
        # The last layers may have none of their own, and use those of the last layer of their kind that has.
        own = self.kinds[: len(self.kinds) - int(getattr(config, "num_kv_shared_layers", 0) or 0)]
        last = {kind: layer for layer, kind in enumerate(own)}
        self.source = [*range(len(own)), *(last[kind] for kind in self.kinds[len(own) :])]
        self._layers = [_LayerCache(kind, self.slots if kind == FULL else self.ring) for kind in self.kinds]
        recurrent = [layer for layer, kind in enumerate(self.kinds) if kind == LINEAR]
        self.states = RecurrentStates(config, recurrent, device)
        self._slots = torch.arange(self.slots, device=device)
        # The current forward pass: `_keys` slots for one token at `position`, else 0 and a chunk from `_start`.
        self._keys, self._start = 0, 0

    @property
    def nbytes(self) -> int:
        """Size of all keys, values and states in bytes; 0 before the first token."""
        tensors = (each for layer in self._layers for each in (layer.keys, layer.values, *(layer.scales or ())))
        return self.states.nbytes + sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)

    @property
    def layers(self) -> dict[int, LayerStates]:
        """The states of recurrent layers by index, where transformers 5.17 looks for them."""
        return self.states.layers

    def place(self, at: int) -> Self:
        """Return the cache of the text in one place, which shares the memory; all buffers must exist."""
        one = copy(self)
        one._places, one.position, one.written = 1, self.position[at : at + 1], 0
        one._layers = [
            _LayerCache(each.kind, each.slots, each.keys[at : at + 1], each.values[at : at + 1], each.scales_at(at))
            if each.keys is not None and each.values is not None
            else each
            for each in self._layers
        ]
        return one

    def started(self, end: int) -> None:
        """Note that a forward pass or step has been started that writes the positions up to `end`."""
        self.states.position, self.written = end, max(self.written, end)

    def forget(self) -> None:
        """Forget the text; keep the memory."""
        self.states.forget()
        self.written = 0

    def holds_before(self, position: int) -> bool:
        """Check whether rings still hold all that a token at this position sees: later ones may have gone round."""
        far = self.written - position
        return not self.window or self.ring >= self.slots or far <= self.ring - self.window

    def reach(self, position: int) -> int:
        """Return the slots of full layers that a step of ours at a position reads at most: few, or all."""
        few = FEW_SLOTS[self.cache_type]
        return min(few, self.slots) if position < few else self.slots

    def begin_step(self, keys: int) -> Masks:
        """Prepare a forward pass of one token at `position`.

        Args:
            keys: slots of full layers that are read; more than `position`.

        Returns:
            Masks (1, 1, 1, slots), True for the slots to attend to.
        """
        self._keys = keys
        return self._by_kind(
            (self._slots[:keys] <= self.position)[None, None, None] if FULL in self.kinds else None,
            self._in_window(self.position, self.position)[None, None, None] if self.window else None,
        )

    def begin_chunk(self, start: int, length: int) -> Masks:
        """Prepare a forward pass of `length` tokens from `start`, the next position of the text.

        Returns:
            Masks (1, 1, length, keys); None for plain causal attention within the chunk.
        """
        self._keys, self._start = 0, start
        new = self._slots[start : start + length]
        full = None if start == 0 else (self._slots[: start + length] <= new[:, None])[None, None]
        if not self.window:
            return self._by_kind(full, None)
        if start == 0 and length <= self.window:
            return self._by_kind(full, None)
        recent = (new <= new[:, None]) & (new > new[:, None] - self.window)
        if start:
            recent = torch.cat([self._in_window(new[:1] - 1, new[:, None]), recent], dim=1)
        return self._by_kind(full, recent[None, None])

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (1, heads, length, head size); return those that its mask covers."""
        layer = self._layers[layer_idx]
        self.allocate(layer_idx, key.shape[1], key.shape[3], key.dtype)
        assert layer.keys is not None  # noqa: S101 -- allocated
        assert layer.values is not None  # noqa: S101 -- allocated
        if self._keys:
            slot = self.position if layer.kind == FULL else self.position % layer.slots
            layer.keys.index_copy_(2, slot, key)
            layer.values.index_copy_(2, slot, value)
            slots = self._keys if layer.kind == FULL else layer.slots
            return layer.keys[:, :, :slots], layer.values[:, :, :slots]
        start, length = self._start, key.shape[2]
        if layer.kind == FULL:
            layer.keys[:, :, start : start + length] = key
            layer.values[:, :, start : start + length] = value
            if start == 0:
                return key, value
            return layer.keys[:, :, : start + length], layer.values[:, :, : start + length]
        seen = (key, value)
        if start:
            # Joined before writing: new tokens may overwrite slots that the first of them still see.
            seen = (torch.cat([layer.keys, key], dim=2), torch.cat([layer.values, value], dim=2))
        last = min(length, layer.slots)
        slot = self._slots[start + length - last : start + length] % layer.slots
        layer.keys.index_copy_(2, slot, key[:, :, length - last :])
        layer.values.index_copy_(2, slot, value[:, :, length - last :])
        return seen

    def update_conv_state(self, new: Tensor, layer_idx: int, *_: Any, **__: Any) -> Tensor:
        """Store a convolution's inputs, (1, channels, length); return them after those that they follow."""
        self.states.allocate(new.dtype)
        return self.states.update_convolution(layer_idx, new, first=not self.has_previous_state())

    def update_recurrent_state(self, new: Tensor, layer_idx: int, *_: Any, **__: Any) -> Tensor:
        """Store the matrices of a recurrent layer, (1, value heads, key size, value size)."""
        return self.states.update_matrices(layer_idx, new)

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Check whether this forward pass continues a text."""
        return self._keys > 0 or self._start > 0

    def get_conv_state(self, layer_idx: int, *_: Any, **__: Any) -> Tensor | None:
        """Return the last inputs of a convolution, (1, channels, kernel size); None at the beginning of a text."""
        return self.layers[layer_idx].conv_states[0] if self.has_previous_state() else None

    def get_recurrent_state(self, layer_idx: int, *_: Any, **__: Any) -> Tensor | None:
        """Return the matrices of a recurrent layer; None at the beginning of a text."""
        return self.layers[layer_idx].recurrent_states[0] if self.has_previous_state() else None

    def is_recording_past(self, *_: Any) -> bool:
        """Tell transformers' layers that states cover no more than the last tokens."""
        return False

    def allocate(self, layer_idx: int, heads: int, size: int, dtype: torch.dtype) -> None:
        """Allocate the keys and values that a layer uses, unless they exist: heads of `size` values."""
        layer = self._layers[self.source[layer_idx]]
        if layer.keys is None:
            shape = self._places, heads, layer.slots, size
            if self.cache_type == "int8" and holds_codes(layer.kind, self.window):
                dtype = torch.int8
                of_keys, of_values = (torch.zeros(shape[:-1], device=self.device) for _ in range(2))
                layer.scales = of_keys, of_values
            layer.keys, layer.values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))

    def buffers(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (places, heads, slots, head size); of codes, `scales` has the scales.

        Raises:
            RuntimeError: no prompt has gone through the model yet.
        """
        layer = self._layers[self.source[layer_idx]]
        if layer.keys is None or layer.values is None:
            raise RuntimeError(f"layer {layer_idx} has no keys yet: run a prompt through the model first")
        return layer.keys, layer.values

    def scales(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return the scales of a layer's keys and values, float32 (places, heads, slots), if it holds codes."""
        found: tuple[Tensor, Tensor] | None = self._layers[self.source[layer_idx]].scales
        return found

    def get_seq_length(self, *_: Any) -> int:
        """Refuse: transformers' models ask a cache for its length only if they get no position_ids."""
        raise NotImplementedError("give the model position_ids")

    def _in_window(self, newest: Tensor, seen_from: Tensor) -> Tensor:
        """Return which slots of a ring hold a position in the window that ends at `seen_from`, bool (…, R).

        Args:
            newest: the last position that was written, (1,).
            seen_from: the positions that attend, (1,) or (length, 1).
        """
        held = newest - (newest - self._slots[: self.ring]) % self.ring
        return (held >= 0) & (held > seen_from - self.window)

    def _by_kind(self, full: Tensor | None, sliding: Tensor | None) -> Masks:
        """Return one mask if all layers are of one kind, else a mask for each kind; recurrent layers have none."""
        if len(set(self.kinds)) == 1:
            return full if self.kinds[0] == FULL else sliding
        return {kind: {FULL: full, SLIDING: sliding}.get(kind) for kind in self.kinds}
