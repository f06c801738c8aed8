"""Which architectures become models, and how GGUF's conventions for each differ from transformers'.

| GGUF           | transformers        | besides names                                                          |
|----------------|---------------------|------------------------------------------------------------------------|
| llama, mistral | llama or mistral    | rows of q and k in another order; `rope_freqs.weight` (Llama 3.1)      |
| qwen2, qwen3   | qwen2, qwen3        |                                                                        |
| gemma2, gemma3 | gemma2, gemma3_text | 1 added to norms; llama.cpp's rules for windows, softcaps and scales   |

llama.cpp writes Mistral models as `llama`. A sliding window in the metadata makes one of them a mistral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.hyperparameters import ONLY_FUNCTIONS, Keys, Shapes, rope, scaled_rope, sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FREQUENCY_FACTORS = "rope_freqs.weight"
"""By what the frequencies of rotary embeddings are divided, float (head_dim / 2,)."""
HEAD = "output.weight"
EMBEDDING = "token_embd.weight"

Values = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures.

    Attributes:
        names: its name in the `gguf` package's maps of tensor names.
        describe: the rest of a configuration: keys and shapes -> transformers' model type and its fields.
        used: keys of `hyperparameters.NEUTRAL` that `describe` heeds.
        interleaved: whether rows of q and k, in each head, alternate between the halves that rotate together.
        norm_offset: what GGUF's norm weights have added.
        frequency_factors: whether `rope_freqs.weight` may be there.
    """

    names: str
    describe: Callable[[Keys, Shapes, Values], tuple[str, Values]]
    used: frozenset[str] = frozenset()
    interleaved: bool = False
    norm_offset: float = 0.0
    frequency_factors: bool = False


def _llama(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    values: Values = {"rope_parameters": scaled_rope(keys)}
    if window := keys.integer("attention.sliding_window", 0, 1 << 31, 0):
        return "mistral", values | {"sliding_window": window}
    return "llama", values | _biases(shapes) | {"mlp_bias": "blk.0.ffn_up.bias" in shapes}


def _qwen2(keys: Keys, _shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen2", {"rope_parameters": scaled_rope(keys)}


def _qwen3(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen3", {"rope_parameters": scaled_rope(keys)} | _biases(shapes)


def _gemma2(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    return "gemma2", {
        "rope_parameters": scaled_rope(keys),
        "attn_logit_softcapping": _softcap(keys, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _softcap(keys, "final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _attention_scalar(keys, values, layers_of_27b=46),
        **_windows(keys, values, period=2, window=4096),
        **_biases(shapes),
    }


def _gemma3(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    ropes = {
        # Only global layers see the whole context, so only they are scaled.
        "full_attention": scaled_rope(keys, theta=1_000_000.0),
        "sliding_attention": rope(keys, "rope.freq_base_swa"),
    }
    return "gemma3_text", {
        "rope_parameters": ropes,
        "final_logit_softcapping": _softcap(keys, "final_logit_softcapping", 0.0),
        "query_pre_attn_scalar": _attention_scalar(keys, values, layers_of_27b=62),
        **_windows(keys, values, period=6, window=0),
        **_biases(shapes),
    }


def _biases(shapes: Shapes) -> Values:
    return {"attention_bias": "blk.0.attn_q.bias" in shapes}


def _softcap(keys: Keys, key: str, default: float) -> float | None:
    return keys.real(key, 0.0, 1e6, default) or None


def _attention_scalar(keys: Keys, values: Values, layers_of_27b: int) -> int:
    """What scores are divided by the root of; most files do not say it, so 27B models are known by their layers."""
    if "attention.scale" in keys:
        scalar = keys.real("attention.scale", 1e-6, 1.0) ** -2
        if abs(scalar - round(scalar)) > 1e-3 * scalar:
            raise keys.wrong(
                "attention.scale", f"expected the root of a whole number, inverted; found {scalar:g} under it"
            )
        return round(scalar)
    if values["num_hidden_layers"] == layers_of_27b:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


def _windows(keys: Keys, values: Values, period: int, window: int) -> Values:
    """Which layers see only a window: all but the last of each `period`."""
    layers = values["num_hidden_layers"]
    window = keys.integer("attention.sliding_window", 0, 1 << 31, window)
    key = "attention.sliding_window_pattern"
    stated = keys.metadata.value(f"{keys.prefix}.{key}")
    if isinstance(stated, list):
        slides = [bool(each) for each in stated]
        if len(slides) != layers:
            raise keys.wrong(key, f"expected one value for each of {layers} layers, found {len(slides)}")
    else:
        period = keys.integer(key, 0, 1 << 16, period)
        # llama.cpp: 0 is no period at all, all layers slide.
        slides = [period == 0 or (layer + 1) % period != 0 for layer in range(layers)]
    slides = [slide and window > 0 for slide in slides]
    return {
        # Without windows transformers still wants one for the mask that no layer uses.
        "sliding_window": window or values["max_position_embeddings"],
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


_WINDOW = "attention.sliding_window"
_LLAMA = Architecture("llama", _llama, frozenset({_WINDOW}), interleaved=True, frequency_factors=True)
_CAPS = {_WINDOW, "attention.scale", "final_logit_softcapping"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _qwen2),
    "qwen3": Architecture("qwen3", _qwen3),
    "gemma2": Architecture("gemma2", _gemma2, frozenset({*_CAPS, "attn_logit_softcapping"}), norm_offset=1.0),
    "gemma3": Architecture("gemma3", _gemma3, frozenset(_CAPS), norm_offset=1.0),
}
"""By `general.architecture`."""


def architecture_of(metadata: Metadata) -> Architecture:
    """The architecture that the metadata names.

    Raises:
        UnsupportedModelError: it is none of those here, or none is named.
    """
    name = metadata.architecture
    if name not in ARCHITECTURES:
        found = repr(name[:80]) if name else "none"
        raise UnsupportedModelError(
            f"{metadata.path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, found {found}",
            ONLY_FUNCTIONS,
        )
    return ARCHITECTURES[name]


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

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.names)
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
