"""The tensors of a bundle against the parameters of its model: names and shapes, before the model is built.

All layers of a kind have the same parameters, so a sample with one layer of each kind tells all names. A file that
names thousands of layers and lacks their tensors is refused before they are built.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.bundle.storage import PLAIN_DTYPES
from q6k_kernels.errors import WeightsError
from q6k_kernels.formats.ggml import dequantizes
from q6k_kernels.models.architecture import (
    FREQUENCY_FACTORS,
    Architecture,
    LayerKind,
    gguf_names,
    is_beside,
    sampled_layers,
)
from q6k_kernels.models.mixtures import stored_parts
from q6k_kernels.models.rotary import FACTORS_LONG, FACTORS_SHORT, rotated
from q6k_kernels.text import listing
from q6k_kernels.weights.reader import Bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORT_AGAIN = "The metadata and the tensors do not belong together: export the model again."
HEAD = "lm_head"
_KEEP = "Convert the model again with --other bf16, and with no --include or --exclude that leaves this tensor out."
_ANOTHER_TYPE = "Weights of this type cannot be read here: use a file of the model in another quantisation."
_ANOTHER_FILE = (
    "The GGUF file that the bundle was made from has no such tensor: use one that holds the whole model."
)
_LAYER = re.compile(r"^blk\.(\d+)\.")


def own_parameters(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters, without a head that shares the embedding's.

    A number that a model keeps as a buffer counts as a parameter if transformers' own files have it.
    """
    config: Any = model.config
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.state_dict(keep_vars=True).items()
        if not (config.tie_word_embeddings and name == f"{HEAD}.weight")
    }


def has_factors(bundle: Bundle, architecture: Architecture) -> bool:
    """Check whether the frequencies of rotary embeddings are divided by a tensor of the bundle."""
    return architecture.frequency_factors and FREQUENCY_FACTORS in bundle


def rotary_factors(
    bundle: Bundle, architecture: Architecture, model: PreTrainedModel
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that `rotary.HeadRotary` needs; both or none are in a file."""
    names = (FACTORS_SHORT, FACTORS_LONG)
    if not architecture.own_rotary or not any(name in bundle for name in names):
        return {}
    return dict.fromkeys(names, (rotated(model.config) // 2,))


def check_tensors(
    bundle: Bundle,
    metadata: Metadata,
    architecture: Architecture,
    sample: PreTrainedModel,
    kinds: Sequence[LayerKind],
) -> list[StoredTensor]:
    """Check that a bundle has the tensors of a model and no others, but those that it does without
    and those left out.

    Args:
        bundle: the bundle.
        metadata: its metadata.
        architecture: how its tensors differ from the model's parameters.
        sample: the model with one layer of each kind.
        kinds: the kind of each layer of the whole model.

    Returns:
        The tensors that the model does without.

    Raises:
        UnsupportedModelError: a parameter has no GGUF name.
        WeightsError: a tensor is missing, left out, raw, unexpected, or has another shape.
    """
    wanted = _wanted(architecture, sample, kinds)
    if has_factors(bundle, architecture):
        wanted[FREQUENCY_FACTORS] = _frequencies(architecture, sample)
    wanted |= rotary_factors(bundle, architecture, sample)
    tensors = {tensor.name: tensor for tensor in bundle.manifest.tensors}
    wanted = _as_stored(wanted, tensors)
    if missing := [name for name in wanted if name not in tensors]:
        raise WeightsError(f"{bundle.path} lacks {_named(missing)}", _ANOTHER_FILE)
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.storage in ("raw", "skipped"):
            what = "stored as raw GGUF blocks" if tensor.storage == "raw" else "left out of the bundle"
            raise WeightsError(f"{bundle.path}: {name} ({tensor.type}) is {what}", _to_load(tensor))
        # Files leave out some dimensions of 1.
        if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
            raise WeightsError(
                f"{bundle.path}: {name}: expected shape {shape}, found {tuple(tensor.shape)}", EXPORT_AGAIN
            )
    others = [tensor for name, tensor in tensors.items() if name not in wanted]
    if extra := [t.name for t in others if t.storage != "skipped" and not is_beside(t.name, metadata)]:
        raise WeightsError(
            f"{bundle.path} has, and {type(sample).__name__} has not, {_named(extra)}",
            "If the model is complete without, convert it again with --exclude for each such tensor.",
        )
    return others


def divides(architecture: Architecture, frequencies: str) -> bool:
    """Check whether `rope_freqs.weight` divides frequencies, given by the name of their buffer."""
    return frequencies.startswith(architecture.factors_of)


def _frequencies(architecture: Architecture, sample: PreTrainedModel) -> tuple[int, ...]:
    """Return the shape of the frequencies that `rope_freqs.weight` divides."""
    inner: Any = sample.model
    return next(tuple(each.shape) for name, each in inner.rotary_emb.named_buffers() if divides(architecture, name))


def _wanted(
    architecture: Architecture, sample: PreTrainedModel, kinds: Sequence[LayerKind]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the file of the tensors of the whole model by GGUF name."""
    shapes, wanted = own_parameters(sample), dict[str, tuple[int, ...]]()
    sampled = [kinds[layer] for layer in sampled_layers(kinds)]
    for parameter, name in gguf_names(architecture, list(shapes), len(sampled)).items():
        every, layer = [name], _LAYER.match(name)
        if layer is not None:
            kind, of_layer = sampled[int(layer[1])], name[layer.end() :]
            every = [f"blk.{index}.{of_layer}" for index, each in enumerate(kinds) if each == kind]
        stored = architecture.difference(name)
        whole = stored.of_model(shapes[parameter], len(sampled), len(kinds))
        wanted |= dict.fromkeys(every, whole)
    return wanted


def _as_stored(wanted: dict[str, tuple[int, ...]], present: Container[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a file has for those of a model, by name."""
    found = dict[str, tuple[int, ...]]()
    for name, shape in wanted.items():
        parts = stored_parts(name, present)
        own = shape if parts == [name] else (shape[0], shape[1] // len(parts), *shape[2:])
        found |= dict.fromkeys(parts, own)
    return found


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return f"the tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors: {listing(names, most=5)}"


def _to_load(tensor: StoredTensor) -> str:
    """Return what to do so that a tensor, raw or left out, can be loaded."""
    return _KEEP if tensor.type in PLAIN_DTYPES or dequantizes(tensor.type) else _ANOTHER_TYPE
