"""A model in the form that leaves Python: tokens, positions and slots in, logits out, its cache a part of it.

    module = ExportableModel(model, capacity=4096)
    logits = module(tokens, positions, slots)        # float32 (1, V), of the token after the last

Layers that attend to everything have a slot for every position, layers with a window a ring of slots (see
`kv_cache`). They are buffers, written in place: what is exported keeps the text so far between calls. A text is
taken in chunks of `chunk` tokens at most, and a ring has room for as many new ones beside those still seen.

How many slots are looked at is an input, or rather its length is, as a length is what a program can depend on
without waiting for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from q6k_kernels.generate.attention import implementation
from q6k_kernels.generate.kv_cache import ALIGNMENT, FULL, SLACK, SLIDING, Masks, aligned, layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_CHUNK = 2048
SHORTEST_CAPACITY = 8


class ExportableModel(nn.Module):
    """One text, continued by a model, as a module without Python objects between its calls.

    Attributes:
        model: transformers', whose attention becomes `attention.implementation("sdpa")`.
        capacity: positions in the cache.
        chunk: the most tokens of one call.
        vocabulary: V of the logits (1, V).

    Args:
        model: a causal language model of transformers', in eval mode, whole on one device.
        capacity: 8 or more; it is rounded up to a multiple of 8.

    Raises:
        ValueError: a smaller capacity.
        UnsupportedModelError: a layer is neither full nor sliding attention.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__()
        if capacity < SHORTEST_CAPACITY:
            raise ValueError(f"capacity: expected {SHORTEST_CAPACITY} or more, found {capacity}")
        self.model = model
        config: Any = model.config.get_text_config(decoder=True)
        self.kinds = layer_kinds(config)
        self.window = int(config.sliding_window) if SLIDING in self.kinds else 0
        self.capacity = aligned(capacity)
        self.ring = min(self.capacity, aligned(self.window + SLACK)) if self.window else self.capacity
        self.chunk = min(self.ring, LONGEST_CHUNK)
        self.vocabulary = int(model.get_output_embeddings().out_features)  # type: ignore[no-untyped-call]
        inner: Any = model.model
        for index, kind in enumerate(self.kinds):
            # A few more than are ever looked at: all of a buffer would be another case to the compiler than a part.
            slots = self.capacity + ALIGNMENT if kind == FULL else self.ring
            shape = (1, config.num_key_value_heads, slots, inner.layers[index].self_attn.head_dim)
            for name in (f"keys_{index}", f"values_{index}"):
                self.register_buffer(name, torch.zeros(shape, dtype=model.dtype, device=model.device))
        model.config._attn_implementation = implementation("sdpa")

    @property
    def state(self) -> dict[str, Tensor]:
        """The cache: names and buffers, zeros at first."""
        return {name: buffer for name, buffer in self.named_buffers() if "." not in name}

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """The next tokens of the text.

        Args:
            tokens: int64 (1, T), T from 1 to `chunk`.
            positions: int64 (T,), theirs: the first begins where the text so far ends, or at 0 for a new text.
            slots: int64 (S,), 0, 1, 2 and so on; S is the first position at least, and 2, `capacity` at most.

        Returns:
            Logits of the token after them, float32 (1, V).
        """
        out = self.model(
            input_ids=tokens,
            attention_mask=self._masks(positions, slots),
            position_ids=positions[None],
            past_key_values=_Cache(self, positions, slots.shape[0]),
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _masks(self, positions: Tensor, slots: Tensor) -> Masks:
        """(1, 1, T, keys), True where a key counts, of layers of each kind."""
        last, before = positions[:, None], positions[:1] - 1
        new = positions <= last
        old = (slots <= before).expand(positions.shape[0], -1)
        masks: dict[str, Tensor | None] = {FULL: torch.cat([old, new], dim=1)[None, None]}
        if self.window:
            held = before - (before - torch.arange(self.ring, device=positions.device)) % self.ring
            old = (held >= 0) & (held > last - self.window)
            new = new & (positions > last - self.window)
            masks[SLIDING] = torch.cat([old, new], dim=1)[None, None]
        # One mask for a model whose layers are of one kind, else a mask for each.
        return masks if len(set(self.kinds)) > 1 else masks[self.kinds[0]]


class _Cache:
    """What transformers' attention layers call; lives as long as one call."""

    def __init__(self, owner: ExportableModel, positions: Tensor, seen: int) -> None:
        self._owner, self._positions, self._seen = owner, positions, seen

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values, (1, heads, T, head size); gives those its mask is about."""
        owner = self._owner
        keys, values = (owner.get_buffer(f"{name}_{layer_idx}") for name in ("keys", "values"))
        full = owner.kinds[layer_idx] == FULL
        slots, count = (self._positions, self._seen) if full else (self._positions % owner.ring, owner.ring)
        # Never read back: in a ring the new may take the places of what the first of them still see. Besides, with
        # keys read back, torch 2.11 compiled a decode for GPUs in which slots told that the mask leaves out; so the
        # mask leaves out what is written here, and it does not matter when a compiler has it read.
        seen = torch.cat([keys[:, :, :count], key], dim=2), torch.cat([values[:, :, :count], value], dim=2)
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
        return seen

    def get_seq_length(self, *_: Any) -> int:
        """A part of transformers' caches; its models ask for it only where they are given no positions."""
        raise NotImplementedError("give the model position_ids")
