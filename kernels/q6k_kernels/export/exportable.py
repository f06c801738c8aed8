"""A model as an exportable module: tokens, positions and slots in, logits out, with the cache as buffers.

    module = ExportableModel(model, capacity=4096)
    logits = module(tokens, positions, slots)        # float32 (1, V), of the token after the last

Full attention layers have a slot for every position, layers with a sliding window a ring of slots (see `kv_cache`).
The buffers are written in place, so an exported program keeps the text between calls. A call takes a chunk of at
most `chunk` tokens.

The number of slots to read is the length of the input `slots`: a program can depend on the length of a tensor
without waiting for the device, but not on a number in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate.attention import implementation
from q6k_kernels.generate.kv_cache import Masks, cache_argument
from q6k_kernels.models.architecture import FULL, SLIDING
from q6k_kernels.models.cache_layout import ALIGNMENT, SLACK, aligned, layer_kinds
from q6k_kernels.models.mixtures import is_mixture
from q6k_kernels.models.ranks import check_whole
from q6k_kernels.models.rotary import rotaries
from q6k_kernels.weights.experts import PackedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_CHUNK = 2048
SHORTEST_CAPACITY = 8
LOWEST = torch.finfo(torch.float32).min
"""Logit of what must not be chosen: a number, so that logits can be subtracted."""


class ExportableModel(nn.Module):
    """A text that a model continues, as a module whose whole state is in buffers.

    Attributes:
        model: transformers' model; its attention becomes `attention.implementation("sdpa")`.
        capacity: positions in the cache.
        chunk: the most tokens of one call.
        vocabulary: V of the logits (1, V).

    Args:
        model: a causal language model of transformers, in eval mode, whole on one device.
        capacity: 8 or more; it is rounded up to a multiple of 8.

    Raises:
        ValueError: the capacity is too small.
        UnsupportedModelError: a layer is neither full nor sliding attention, has experts, or uses another's keys;
            or the model is divided among ranks.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__()
        if capacity < SHORTEST_CAPACITY:
            raise ValueError(f"capacity: expected {SHORTEST_CAPACITY} or more, found {capacity}")
        check_whole(model, "be exported")
        self.model = model
        self._cache_argument = cache_argument(model)
        config: Any = model.config.get_text_config(decoder=True)
        self.kinds = layer_kinds(config)
        if unknown := set(self.kinds) - {FULL, SLIDING}:
            raise _unsupported(f"cannot hold the states of layers of kind {', '.join(unknown)}")
        if any(isinstance(module, PackedExperts) or is_mixture(module) for module in model.modules()):
            raise _unsupported("have no mixtures of experts")
        if getattr(config, "num_kv_shared_layers", 0):
            raise _unsupported("have no layers that use the keys and values of others")
        self.window = int(config.sliding_window) if SLIDING in self.kinds else 0
        self.capacity = aligned(capacity)
        self.ring = min(self.capacity, aligned(self.window + SLACK)) if self.window else self.capacity
        self.chunk = min(self.ring, LONGEST_CHUNK)
        self.vocabulary = int(model.get_output_embeddings().out_features)  # type: ignore[no-untyped-call]
        named: list[int] | None = model.generation_config.suppress_tokens
        # No buffer, which would be a part of the cache.
        self._suppressed = torch.tensor(named, device=model.device) if named else None
        inner: Any = model.model
        for index, kind in enumerate(self.kinds):
            # More slots than are ever read: the compiler treats all of a buffer differently from a part of it.
            slots = self.capacity + ALIGNMENT if kind == FULL else self.ring
            attention = inner.layers[index].self_attn
            key_heads = config.num_attention_heads // attention.num_key_value_groups
            shape = (1, key_heads, slots, attention.head_dim)
            for name in (f"keys_{index}", f"values_{index}"):
                self.register_buffer(name, torch.zeros(shape, dtype=model.dtype, device=model.device))
        model.config._attn_implementation = implementation("sdpa")
        for rotary in rotaries(model):
            rotary.capacity = self.capacity

    @property
    def state(self) -> dict[str, Tensor]:
        """The buffers of the cache by name, zeros at first."""
        return {name: buffer for name, buffer in self.named_buffers() if "." not in name}

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Process the next tokens of the text.

        Args:
            tokens: int64 (1, T), T from 1 to `chunk`.
            positions: positions of the tokens, int64 (T,): they continue the text, or begin at 0 for a new text.
            slots: 0, 1, 2 and so on, int64 (S,). S is at least 2 and the first position, and at most `capacity`.

        Returns:
            Logits of the token after them, float32 (1, V); `LOWEST` for those that must not be chosen.
        """
        out = self.model(
            input_ids=tokens,
            attention_mask=self._masks(positions, slots),
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: _Cache(self, positions, slots.shape[0])},
        )
        logits: Tensor = out.logits[:, -1].float()
        if self._suppressed is not None:
            logits = logits.index_fill(1, self._suppressed, LOWEST)
        return logits

    def _masks(self, positions: Tensor, slots: Tensor) -> Masks:
        """Return the masks of each kind of layer, bool (1, 1, T, keys), True for the keys to attend to."""
        last, before = positions[:, None], positions[:1] - 1
        new = positions <= last
        old = (slots <= before).expand(positions.shape[0], -1)
        masks: dict[str, Tensor | None] = {FULL: torch.cat([old, new], dim=1)[None, None]}
        if self.window:
            held = before - (before - torch.arange(self.ring, device=positions.device)) % self.ring
            old = (held >= 0) & (held > last - self.window)
            new = new & (positions > last - self.window)
            masks[SLIDING] = torch.cat([old, new], dim=1)[None, None]
        # One mask if all layers are of one kind, else a mask for each kind.
        return masks if len(set(self.kinds)) > 1 else masks[self.kinds[0]]


def _unsupported(problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"programs {problem}",
        "Run the bundle itself: `q6k-convert generate`, or `q6k_kernels.load_model` from Python.",
    )


class _Cache:
    """The cache that transformers' attention layers see during one call."""

    def __init__(self, owner: ExportableModel, positions: Tensor, seen: int) -> None:
        self._owner, self._positions, self._seen = owner, positions, seen

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (1, heads, T, head size); return those that its mask covers."""
        owner = self._owner
        keys, values = (owner.get_buffer(f"{name}_{layer_idx}") for name in ("keys", "values"))
        full = owner.kinds[layer_idx] == FULL
        slots, count = (self._positions, self._seen) if full else (self._positions % owner.ring, owner.ring)
        # Joined before writing: in a ring new tokens may overwrite slots that the first of them still see. The mask
        # excludes the slots written here, so the order in which a compiler reads and writes does not matter. With
        # keys read back after writing, torch 2.11 compiled a decode for GPUs that depended on masked slots.
        seen = torch.cat([keys[:, :, :count], key], dim=2), torch.cat([values[:, :, :count], value], dim=2)
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
        return seen

    def get_seq_length(self, *_: Any) -> int:
        """Refuse: transformers' models ask a cache for its length only if they get no position_ids."""
        raise NotImplementedError("give the model position_ids")
