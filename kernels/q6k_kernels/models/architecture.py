"""The facts about an architecture: how its GGUF files differ from transformers' models, what its layers compute.

Each family of models has a file here with one row for each of its architectures; `registry` collects them.
`load_model` attaches the row to the model. Code that fills or runs a model asks the row, never the model's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.hyperparameters import ONLY_FUNCTIONS, PREDICTION, Keys, Shapes
from q6k_kernels.models.layer import (
    HALVES_ROTATE,
    NORMS_BEFORE,
    Activation,
    ExpertsForm,
    HeadNorms,
    LayerNorms,
    Rotation,
)
from q6k_kernels.models.sizes import sizes
from q6k_kernels.models.stored import AS_IT_IS, Stored

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""The kinds of layers, by transformers' names: attention to all positions, to a window of them, and by a state."""
FREQUENCY_FACTORS = "rope_freqs.weight"
"""Name of the tensor that divides the frequencies of rotary embeddings, float (head_dim / 2,)."""

_ENCODERS = ("v.", "mm.", "a.")
"""What the names of tensors begin with that belong to encoders of images and sound, beside a model of text."""
_BLOCK = re.compile(r"^blk\.(\d{1,9})\.")
_OF_LAYER, _PARAMETER_OF_LAYER = re.compile(r"^blk\.\d+\."), re.compile(r"^model\.layers\.\d+\.")

Values = dict[str, Any]
LayerKind = tuple[str, bool]
"""The kind of a layer: transformers' name of its attention, and whether it uses another layer's keys and values."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF.

    Attributes:
        name: its `general.architecture` in GGUF.
        describe: maps keys, shapes and the common values to transformers' model type and its further fields.
        tensor_names: its name in the `gguf` package's maps of tensor names; by default `name`.
        used: keys of `hyperparameters.NEUTRAL` that `describe` takes into account, and `ROTARY` if only a part of a
            head is rotated.
        renamed: parameters of a layer that the maps of the `gguf` package know by another name, and that name.
        stored: what differs in the file from transformers' parameters, by names as in `ssm_a` or `attn_q.weight`.
        sizes: reads the sizes of a model.
        frequency_factors: whether a file may have `rope_freqs.weight`.
        own_rotary: whether rotary embeddings are `rotary.HeadRotary`, and a file may have factors for it.
        factors_of: kind of layers whose frequencies it divides; by default all.
        norm_offset: number that GGUF adds to the weights of norms; transformers adds it in the norm instead.
        norms: the norms of a layer.
        head_norms: the norms of q and k, or None.
        gated_attention: whether each head of q comes with a gate of the head's output.
        value_norms: whether each head of v has a norm, one without weights.
        sinks: whether each head of q has a score of no key, which takes a part of the weights.
        scaled_layers: whether the output of each layer is multiplied by a number of the file.
        activation: activation function of the gate in the feed-forward network, or of a network without a gate.
        gated_network: whether the feed-forward network has a gate.
        scaled_embedding: whether the rows of the embedding are multiplied by a constant.
        capped_scores: whether attention scores may have a soft cap, `attn_logit_softcapping`.
        capped_logits: whether logits may have a soft cap, `final_logit_softcapping`.
        multipliers: whether embeddings, residual summands and logits are scaled by Granite's fields.
        scaled_logits: whether logits are multiplied by `logit_scale`.
        rotation: how heads rotate.
        growing_queries: whether queries may be multiplied by a number that grows with their position.
        experts: where layers have a mixture of experts, or None.
        embedded_layers: whether layers may have embeddings of their own.
        adapt: changes modules of transformers' model before it is filled.
    """

    name: str
    describe: Callable[[Keys, Shapes, Values], tuple[str, Values]]
    tensor_names: str = ""
    used: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)
    sizes: Callable[[Keys, Shapes], Values] = sizes
    frequency_factors: bool = False
    own_rotary: bool = False
    factors_of: str = ""
    norm_offset: float = 0.0
    norms: LayerNorms = NORMS_BEFORE
    head_norms: HeadNorms | None = None
    gated_attention: bool = False
    value_norms: bool = False
    sinks: bool = False
    scaled_layers: bool = False
    activation: Activation = "silu"
    gated_network: bool = True
    scaled_embedding: bool = False
    capped_scores: bool = False
    capped_logits: bool = False
    multipliers: bool = False
    scaled_logits: bool = False
    rotation: Rotation = HALVES_ROTATE
    growing_queries: bool = False
    experts: ExpertsForm | None = None
    embedded_layers: bool = False
    adapt: Callable[[PreTrainedModel], None] | None = None

    def difference(self, name: str) -> Stored:
        """Return how a tensor, given by its GGUF name, is stored differently."""
        of_layer = _OF_LAYER.sub("", name)
        if of_layer in self.stored:
            return self.stored[of_layer]
        if self.norm_offset and name.endswith("norm.weight"):
            return Stored(values=lambda values: values - self.norm_offset)
        return AS_IT_IS

    def softcap_of_scores(self, config: PretrainedConfig) -> float | None:
        """Return the soft cap of a model's attention scores; None if there is none."""
        return config.attn_logit_softcapping if self.capped_scores else None

    def softcap_of_logits(self, config: PretrainedConfig) -> float | None:
        """Return the soft cap of a model's logits; None if there is none."""
        return config.final_logit_softcapping if self.capped_logits else None

    def factor_of_logits(self, config: PretrainedConfig) -> float:
        """Return the factor of a model's logits."""
        if self.multipliers:
            return 1 / float(config.logits_scaling)
        return float(config.logit_scale) if self.scaled_logits else 1.0

    def growth_of_queries(self, config: PretrainedConfig) -> tuple[float, int] | None:
        """Return b and n if a query at position p is multiplied by 1 + b ln(1 + floor(p / n)); else None."""
        rope: Any = config.rope_parameters if self.growing_queries else {}
        growth = rope.get("llama_4_scaling_beta")
        return (growth, rope["original_max_position_embeddings"]) if growth else None


ATTACHED = "q6k_architecture"
"""Name of the attribute that holds a model's architecture."""


def attach(model: nn.Module, architecture: Architecture) -> None:
    """Attach an architecture to a model that was built from it; copies of the model keep it."""
    model.__dict__[ATTACHED] = architecture


def attached(model: nn.Module) -> Architecture | None:
    """Return the architecture that a model was built from; None if `load_model` did not build it."""
    architecture: Architecture | None = model.__dict__.get(ATTACHED)
    return architecture


def is_of_encoder(name: str) -> bool:
    """Check whether a tensor belongs to an encoder of images or sound, which a model of text does without."""
    return name.startswith(_ENCODERS)


def is_beside(name: str, metadata: Metadata) -> bool:
    """Check whether a model of text does without a tensor: one of an encoder, or of a block after the last layer.

    Raises:
        BundleError: a key is of the wrong type.
    """
    predicting = metadata.integer(f"{metadata.architecture}.{PREDICTION}") or 0
    if not predicting or (block := _BLOCK.match(name)) is None:
        return is_of_encoder(name)
    return int(block[1]) >= (metadata.integer(f"{metadata.architecture}.block_count") or 0) - predicting


def biases(shapes: Shapes) -> Values:
    """Return the configuration field that says whether attention has biases."""
    return {"attention_bias": "blk.0.attn_q.bias" in shapes}


def described(architecture: Architecture, metadata: Metadata, shapes: Shapes) -> tuple[str, Values]:
    """Return transformers' model type and the fields of its configuration.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: the model needs something that is not supported.
        BundleError: a key is of the wrong type.
    """
    keys = Keys(metadata, architecture.used)
    values = architecture.sizes(keys, shapes)
    kind, more = architecture.describe(keys, shapes, values)
    keys.check_all_read()
    return kind, values | more


def kinds_of_layers(values: Values) -> list[LayerKind]:
    """Return the kind of each layer; all layers of a kind have the same parameters."""
    layers = values["num_hidden_layers"]
    own = layers - (values.get("num_kv_shared_layers") or 0)
    types = values.get("layer_types") or [""] * layers
    return [(kind, layer >= own) for layer, kind in enumerate(types)]


def sampled_layers(kinds: Sequence[LayerKind]) -> list[int]:
    """Return the layers of a sample: the last of each kind, in their order."""
    return sorted({kind: layer for layer, kind in enumerate(kinds)}.values())


def make_config(
    architecture: Architecture, metadata: Metadata, shapes: Shapes, *, sample: bool = False
) -> PretrainedConfig:
    """Make the transformers configuration of a model, or of a sample: `sampled_layers`.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: the model needs something that is not supported, or transformers refuses it.
        BundleError: a key is of the wrong type.
    """
    from transformers import AutoConfig

    kind, values = described(architecture, metadata, shapes)
    if sample:
        kinds = kinds_of_layers(values)
        sampled = [kinds[layer] for layer in sampled_layers(kinds)]
        values["num_hidden_layers"] = len(sampled)
        if "layer_types" in values:
            values["layer_types"] = [kind for kind, _ in sampled]
        if "num_kv_shared_layers" in values:
            values["num_kv_shared_layers"] = sum(shares for _, shares in sampled)
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:
        # The class of the error differs between versions of transformers.
        raise UnsupportedModelError(
            f"{metadata.path}: transformers refuses the configuration: {error}", ONLY_FUNCTIONS
        ) from error


def gguf_names(architecture: Architecture, parameters: list[str], layers: int) -> dict[str, str]:
    """Map the names of a transformers model's parameters to GGUF names.

    Raises:
        UnsupportedModelError: a parameter has no GGUF name.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    wanted = architecture.tensor_names or architecture.name
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted)
    names = get_tensor_name_map(MODEL_ARCH(arch), layers)
    found = dict[str, str]()
    for parameter in parameters:
        of_layer = _PARAMETER_OF_LAYER.sub("", parameter)
        known = parameter.removesuffix(of_layer) + architecture.renamed.get(of_layer, of_layer)
        module, _, kind = known.rpartition(".")
        # gguf's map has no entry for gemma2's head, as all known gemma2 models tie it.
        if (name := "output" if module == "lm_head" else names.get_name(module)) is not None:
            found[parameter] = f"{name}.{kind}"
        elif (name := names.get_name(known)) is not None:
            found[parameter] = name
        else:
            raise UnsupportedModelError(f"no GGUF name is known for the parameter {parameter}", ONLY_FUNCTIONS)
    return found
