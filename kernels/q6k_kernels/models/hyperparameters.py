"""From a bundle's metadata to the numbers of a transformers configuration, each checked.

Keys are those of llama.cpp, `ARCHITECTURE.attention.head_count` and so on, with its defaults. A key that changes
what a model computes in an unsupported way is refused, unless its value has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from q6k_kernels.bundle.metadata import CONTEXT_LENGTH, Metadata
from q6k_kernels.errors import HyperparameterError, UnsupportedModelError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the bundle's tensors, by GGUF name."""

MAX_CONTEXT = (1 << 31) - 1
MAX_LAYERS = 1 << 14
EXPORT_AGAIN = "Export the model again with a current converter (convert_hf_to_gguf.py of llama.cpp)."
ONLY_FUNCTIONS = "Its tensors can still be used one by one: `q6k_kernels.open_bundle`."

WINDOW = "attention.sliding_window"
WINDOW_PATTERN = "attention.sliding_window_pattern"
SHARED_LAYERS = "attention.shared_kv_layers"
"""Last layers that have no keys and values of their own."""
EXPERTS, EXPERTS_USED = "expert_count", "expert_used_count"
EXPERT_WIDTH = "expert_feed_forward_length"
SCORE_SCALE = "attention.scale"
TEMPERATURE, YARN_SCALE = "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"
ATTENTION_FACTOR = "rope.scaling.attn_factor"
PREDICTION = "nextn_predict_layers"
"""Blocks after the last layer that predict several tokens at once: the model computes the same without them."""
ROTARY = "rope.dimension_count"
SECTIONS = "rope.dimension_sections"
EMBEDDING_SCALE, RESIDUAL_SCALE, LOGIT_SCALE = "embedding_scale", "residual_scale", "logit_scale"
SCORE_CAP, LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    EXPERTS: (0,),
    EXPERTS_USED: (0,),
    PREDICTION: (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (),
    SCORE_SCALE: (),
    SHARED_LAYERS: (0,),
    WINDOW: (0,),
    "attention.temperature_length": (0,),
    TEMPERATURE: (0.0,),
    SCORE_CAP: (0.0,),
    LOGIT_CAP: (0.0,),
    EMBEDDING_SCALE: (1.0,),
    LOGIT_SCALE: (0.0, 1.0),
    RESIDUAL_SCALE: (0.0, 1.0),
    SECTIONS: (),
    "rope.scaling.alpha": (0.0, 1.0),
    ATTENTION_FACTOR: (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    YARN_SCALE: (0.0,),
}
"""Keys that change what a model computes -> their values without effect."""
WITHOUT_EFFECT = (
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
"""Keys of attention and rotary embeddings that change nothing, or nothing unless another key asks for them."""


class Keys:
    """The keys of one architecture, read with types and bounds; errors give the full name of a key.

    Args:
        metadata: metadata of the bundle.
        used: keys of `NEUTRAL` that the architecture takes into account.

    Raises:
        UnsupportedModelError: another key of `NEUTRAL` has an effect.
    """

    def __init__(self, metadata: Metadata, used: frozenset[str] = frozenset()) -> None:
        self.metadata, self.used = metadata, used
        self.prefix = metadata.architecture
        self._read = {*NEUTRAL, *WITHOUT_EFFECT}
        for key, values in NEUTRAL.items():
            full = f"{self.prefix}.{key}"
            if key not in used and full in metadata and (value := metadata.value(full)) not in values:
                raise UnsupportedModelError(
                    f"{metadata.path}: {full} = {str(value)[:80]}: models of {self.prefix} are built without it",
                    ONLY_FUNCTIONS,
                )

    def check_all_read(self) -> None:
        """Raise UnsupportedModelError for a key of attention or of rotary embeddings that nothing has asked for."""
        for full in self.metadata.keys:
            key = full.removeprefix(f"{self.prefix}.")
            if key != full and key.startswith(("attention.", "rope.")) and key not in self._read:
                raise UnsupportedModelError(
                    f"{self.metadata.path}: {full[:200]}: models of {self.prefix} are built without it",
                    ONLY_FUNCTIONS,
                )

    def __contains__(self, key: str) -> bool:
        self._read.add(key)
        return f"{self.prefix}.{key}" in self.metadata

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number from `low` to `high`; `default` if the key is absent.

        An array with the same number for each layer counts as that number.

        Raises:
            HyperparameterError: the key is absent without a default, or out of range.
            UnsupportedModelError: the numbers of the layers differ.
            BundleError: the key has another type.
        """
        self._read.add(key)
        full = f"{self.prefix}.{key}"
        value = self._same(key) if self.metadata.length(full) is not None else self.metadata.integer(full)
        return int(self._bounded(key, value, low, high, default))

    def of_layers(self, key: str, low: int, high: int, default: int | None = None) -> list[int]:
        """Return a whole number for each layer, which may differ, with the other errors of `integer`."""
        layers = self.integer("block_count", 1, MAX_LAYERS)
        if self.metadata.length(f"{self.prefix}.{key}") is None:
            return [self.integer(key, low, high, default)] * layers
        self._read.add(key)
        return [int(self._bounded(key, value, low, high, None)) for value in self._listed(key)]

    def flags_of_layers(self, key: str) -> list[bool] | None:
        """Return true or false for each layer; None if the key is absent.

        Raises:
            HyperparameterError: the key is no array, or one of another length.
        """
        layers = self.integer("block_count", 1, MAX_LAYERS)
        value = self.value(key)
        if value is not None and (not isinstance(value, list) or len(value) != layers):
            found = len(value) if isinstance(value, list) else str(value)[:80]
            raise self.wrong(key, f"expected one value for each of {layers} layers, found {found}")
        return None if value is None else [bool(each) for each in value]

    def _listed(self, key: str) -> list[int]:
        """Return the numbers of an array, one for each layer."""
        layers = self.integer("block_count", 1, MAX_LAYERS) if key != "block_count" else 0
        count = self.metadata.length(f"{self.prefix}.{key}")
        if count != layers:
            raise self.wrong(key, f"expected one number, or one for each of {layers} layers, found {count}")
        return self.metadata.integers(f"{self.prefix}.{key}") or [0]

    def _same(self, key: str) -> int:
        """Return the number that an array has for every layer."""
        values = self._listed(key)
        if len(set(values)) > 1:
            raise UnsupportedModelError(
                f"{self.metadata.path}: {self.prefix}.{key} differs between layers: {min(values)} to {max(values)}",
                ONLY_FUNCTIONS,
            )
        return values[0]

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a number from `low` to `high`, with the errors of `integer`."""
        self._read.add(key)
        return float(self._bounded(key, self.metadata.real(f"{self.prefix}.{key}"), low, high, default))

    def string(self, key: str, default: str) -> str:
        """Return a text; `default` if the key is absent."""
        self._read.add(key)
        value = self.metadata.string(f"{self.prefix}.{key}")
        return default if value is None else value

    def value(self, key: str) -> object:
        """Return a value of any type; None if the key is absent."""
        self._read.add(key)
        return self.metadata.value(f"{self.prefix}.{key}")

    def wrong(self, key: str, problem: str) -> HyperparameterError:
        """Return an error about a key."""
        return HyperparameterError(f"{self.metadata.path}: {self.prefix}.{key}: {problem}", EXPORT_AGAIN)

    def expect(self, key: str, value: int, expected: int, why: str) -> None:
        """Raise HyperparameterError unless a number equals what the tensors say."""
        if value != expected:
            raise self.wrong(key, f"expected {expected}, {why}, found {value}")

    def _bounded(self, key: str, value: Any, low: Any, high: Any, default: Any) -> Any:
        if value is None:
            value = default
        if value is None:
            raise self.wrong(key, "missing")
        if not low <= value <= high:
            raise self.wrong(key, f"expected {low} to {high}, found {value}")
        return value


def rope(keys: Keys, key: str = "rope.freq_base") -> dict[str, Any]:
    """Return the parameters of unscaled rotary embeddings: theta from a key, or llama.cpp's default."""
    return {"rope_type": "default", "rope_theta": keys.real(key, 1.0, 1e12, 10000.0)}


def original_context(keys: Keys) -> int:
    """Return the positions that a model was trained with before its rotary embeddings were scaled."""
    whole = keys.integer(CONTEXT_LENGTH, 1, MAX_CONTEXT)
    return keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, whole)


def rotated_part(keys: Keys, head_dim: int) -> float:
    """Return the part of a head that rotates; transformers rounds its product with the head's size down."""
    count = keys.integer(ROTARY, 2, head_dim, head_dim)
    if count % 2:
        raise keys.wrong(ROTARY, f"expected an even number, found {count}")
    part = count / head_dim
    return part if int(head_dim * part) == count else math.nextafter(part, 1.0)


def scaled_rope(keys: Keys) -> dict[str, Any]:
    """Return the parameters of rotary embeddings with the scaling that the metadata names: none, linear or YaRN.

    Raises:
        UnsupportedModelError: the metadata names another scaling.
    """
    found = rope(keys)
    # Files of 2023 have `rope.scale_linear` instead.
    factor = keys.real("rope.scale_linear", 0.0, 1e6, 0.0)
    factor = keys.real("rope.scaling.factor", 0.0, 1e6, factor)
    kind = keys.string("rope.scaling.type", "linear")
    if kind == "none" or factor in (0.0, 1.0):
        return found
    if kind == "linear":
        return {**found, "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{keys.metadata.path}: {keys.prefix}.rope.scaling.type: expected none, linear or yarn, found {kind!r}",
            ONLY_FUNCTIONS,
        )
    found |= {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_context(keys),
    }
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in keys:
            found[name] = keys.real(f"rope.scaling.yarn_{name}", 0.0, 1e6)
    return found
