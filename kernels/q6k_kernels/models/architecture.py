"""What an architecture is: how its GGUF files differ from transformers' models, and what its layers compute.

Each family of models has a file here with one row for each of its architectures; `registry` collects them. Whoever
fills or runs a model asks its row, which `load_model` leaves on the model, and looks at no class or attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.hyperparameters import ONLY_FUNCTIONS, Keys, Shapes, sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FREQUENCY_FACTORS = "rope_freqs.weight"
"""By what the frequencies of rotary embeddings are divided, float (head_dim / 2,)."""

Activation = Literal["silu", "gelu_tanh"]
Values = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures.

    Attributes:
        name: in GGUF, `general.architecture`.
        describe: the rest of a configuration: keys and shapes -> transformers' model type and its fields.
        tensor_names: its name in the `gguf` package's maps of tensor names; by default `name`.
        used: keys of `hyperparameters.NEUTRAL` that `describe` heeds.
        interleaved: whether rows of q and k, in each head, alternate between the halves that rotate together.
        frequency_factors: whether `rope_freqs.weight` may be there.
        norm_offset: what GGUF has added to norms' weights; transformers has not, and adds it when it norms.
        norms_after: whether each half of a layer has a norm after it too, and not only one before it.
        head_norms: whether each head of q and k is normed.
        activation: the function of the gate in a feed-forward network.
        scaled_embedding: whether rows of the embedding are multiplied by a number.
        capped_scores: whether scores of attention may have a soft cap, `attn_logit_softcapping`.
        capped_logits: whether logits may have one, `final_logit_softcapping`.
        angles_by_kind: whether layers with windows rotate heads by angles of their own.
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
"""Name of the attribute."""


def attach(model: nn.Module, architecture: Architecture) -> None:
    """Leave an architecture on a model that was built by it, for `attached`; copies of the model keep it."""
    model.__dict__[ATTACHED] = architecture


def attached(model: nn.Module) -> Architecture | None:
    """Return the architecture that a model was built by; None if `load_model` has not built it."""
    architecture: Architecture | None = model.__dict__.get(ATTACHED)
    return architecture


def biases(shapes: Shapes) -> Values:
    """Return whether attention has biases, for a configuration."""
    return {"attention_bias": "blk.0.attn_q.bias" in shapes}


def make_config(architecture: Architecture, metadata: Metadata, shapes: Shapes) -> PretrainedConfig:
    """The transformers configuration of a model.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: the model does something that is not built here, or transformers refuses it.
        BundleError: a key is of the wrong type.
    """
    from transformers import AutoConfig

    keys = Keys(metadata, architecture.used)
    values = sizes(keys, shapes)
    kind, more = architecture.describe(keys, shapes, values)
    try:
        return AutoConfig.for_model(kind, **values, **more)
    except Exception as error:
        # It has classes of its own for what it refuses, not the same in all versions.
        raise UnsupportedModelError(
            f"{metadata.path}: transformers refuses the configuration: {error}", ONLY_FUNCTIONS
        ) from error


def gguf_names(architecture: Architecture, parameters: list[str], layers: int) -> dict[str, str]:
    """Names of a transformers model's parameters -> GGUF names.

    Raises:
        UnsupportedModelError: a parameter has none.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    wanted = architecture.tensor_names or architecture.name
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted)
    names = get_tensor_name_map(MODEL_ARCH(arch), layers)
    found = dict[str, str]()
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        # gguf's map leaves out the heads of gemma2, which are tied in all known models.
        name = "output" if module == "lm_head" else names.get_name(module)
        if name is None:
            raise UnsupportedModelError(f"no GGUF name is known for the parameter {parameter}", ONLY_FUNCTIONS)
        found[parameter] = f"{name}.{kind}"
    return found


def is_interleaved(architecture: Architecture, name: str) -> bool:
    """Whether a tensor's rows are in the order that `row_order` is for."""
    return architecture.interleaved and (".attn_q." in name or ".attn_k." in name)


def row_order(rows: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Where transformers' rows of q and k lie in a llama GGUF, int64 (rows,).

    Rotary embeddings turn pairs of rows. llama.cpp has the two of a pair side by side, transformers half a head
    apart: row (head, half, pair) of transformers is row (head, pair, half) of GGUF.

    Args:
        rows: a multiple of `head_dim`.
        head_dim: even.
        device: where; the CPU by default.
    """
    return torch.arange(rows, device=device).view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)
