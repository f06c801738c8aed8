"""The facts about an architecture: how its GGUF files differ from transformers' models, what its layers compute.

Each family of models has a file here with one row for each of its architectures; `registry` collects them.
`load_model` attaches the row to the model. Code that fills or runs a model asks the row, never the model's class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.hyperparameters import ONLY_FUNCTIONS, Keys, Shapes, sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

FREQUENCY_FACTORS = "rope_freqs.weight"
"""Name of the tensor that divides the frequencies of rotary embeddings, float (head_dim / 2,)."""

_ENCODERS = ("v.", "mm.", "a.")
"""What the names of tensors begin with that belong to encoders of images and sound, beside a model of text."""

Activation = Literal["silu", "gelu_tanh"]
Values = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF.

    Attributes:
        name: its `general.architecture` in GGUF.
        describe: maps keys, shapes and the common values to transformers' model type and its further fields.
        tensor_names: its name in the `gguf` package's maps of tensor names; by default `name`.
        used: keys of `hyperparameters.NEUTRAL` that `describe` takes into account.
        interleaved: whether the rows of q and k alternate between the two halves of a head, see `row_order`.
        frequency_factors: whether a file may have `rope_freqs.weight`.
        norm_offset: number that GGUF adds to the weights of norms; transformers adds it in the norm instead.
        norms_after: whether attention and feed-forward network have a norm after them as well as before.
        head_norms: whether each head of q and k has a norm.
        activation: activation function of the gate in the feed-forward network.
        scaled_embedding: whether the rows of the embedding are multiplied by a constant.
        capped_scores: whether attention scores may have a soft cap, `attn_logit_softcapping`.
        capped_logits: whether logits may have a soft cap, `final_logit_softcapping`.
        angles_by_kind: whether layers with a sliding window have their own rotary angles.
    """

    name: str
    describe: Callable[[Keys, Shapes, Values], tuple[str, Values]]
    tensor_names: str = ""
    used: frozenset[str] = frozenset()
    interleaved: bool = False
    frequency_factors: bool = False
    norm_offset: float = 0.0
    norms_after: bool = False
    head_norms: bool = False
    activation: Activation = "silu"
    scaled_embedding: bool = False
    capped_scores: bool = False
    capped_logits: bool = False
    angles_by_kind: bool = False

    def softcap_of_scores(self, config: PretrainedConfig) -> float | None:
        """Return the soft cap of a model's attention scores; None if there is none."""
        return config.attn_logit_softcapping if self.capped_scores else None

    def softcap_of_logits(self, config: PretrainedConfig) -> float | None:
        """Return the soft cap of a model's logits; None if there is none."""
        return config.final_logit_softcapping if self.capped_logits else None


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
    values = sizes(keys, shapes)
    kind, more = architecture.describe(keys, shapes, values)
    keys.check_all_read()
    return kind, values | more


def make_config(
    architecture: Architecture, metadata: Metadata, shapes: Shapes, layers: int | None = None
) -> PretrainedConfig:
    """Make the transformers configuration of a model, or of its first layers.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: the model needs something that is not supported, or transformers refuses it.
        BundleError: a key is of the wrong type.
    """
    from transformers import AutoConfig

    kind, values = described(architecture, metadata, shapes)
    if layers is not None:
        kinds = {"layer_types": values["layer_types"][:layers]} if "layer_types" in values else {}
        values |= {"num_hidden_layers": layers} | kinds
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
        module, _, kind = parameter.rpartition(".")
        # gguf's map has no entry for gemma2's head, as all known gemma2 models tie it.
        name = "output" if module == "lm_head" else names.get_name(module)
        if name is None:
            raise UnsupportedModelError(f"no GGUF name is known for the parameter {parameter}", ONLY_FUNCTIONS)
        found[parameter] = f"{name}.{kind}"
    return found


def is_interleaved(architecture: Architecture, name: str) -> bool:
    """Check whether a tensor's rows have to be reordered by `row_order`."""
    return architecture.interleaved and (".attn_q." in name or ".attn_k." in name)


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
