"""A model of transformers on the meta device, with the modules that a bundle fills."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import PackageMissingError
from q6k_kernels.models.architecture import Architecture, attach, gguf_names, kinds_of_layers, make_config
from q6k_kernels.models.delta_net import GatedDeltaNet
from q6k_kernels.models.hyperparameters import Shapes
from q6k_kernels.models.matching import check_tensors
from q6k_kernels.models.sizes import suppressed_tokens
from q6k_kernels.weights.reader import Bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OLDEST_TRANSFORMERS = (5, 17)
"""The oldest supported release of transformers."""


def check_transformers() -> None:
    """Check that transformers is there and new enough.

    Raises:
        PackageMissingError: it is not.
    """
    wanted = ".".join(map(str, OLDEST_TRANSFORMERS))
    remedy = "Install it: `pip install 'q6k-convert[inference]'`."
    try:
        from transformers import __version__
    except ImportError as error:
        raise PackageMissingError(f"transformers {wanted} or later is needed: {error}", remedy) from error
    if tuple(map(int, re.findall(r"\d+", __version__)[:2])) < OLDEST_TRANSFORMERS:
        raise PackageMissingError(f"transformers {wanted} or later is needed, found {__version__}", remedy)


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Check that a model of a dtype runs on a device.

    Raises:
        ValueError: it does not.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and dtype is torch.float32):
        raise ValueError(f"expected a CPU, or a GPU with bfloat16 or float16, found {dtype} on {device}")


def shapes_of(bundle: Bundle) -> Shapes:
    """Return the shapes of a bundle's tensors, by name."""
    return {tensor.name: tuple(tensor.shape) for tensor in bundle.manifest.tensors}


def matched(
    bundle: Bundle, metadata: Metadata, architecture: Architecture, dtype: torch.dtype
) -> list[StoredTensor]:
    """Check that a bundle has the tensors of its model; return those that it does without. See `check_tensors`."""
    sample = skeleton(bundle, metadata, architecture, dtype, sample=True)
    kinds = kinds_of_layers(make_config(architecture, metadata, shapes_of(bundle)).to_dict())
    return check_tensors(bundle, metadata, architecture, sample, kinds)


def skeleton(
    bundle: Bundle, metadata: Metadata, architecture: Architecture, dtype: torch.dtype, *, sample: bool = False
) -> PreTrainedModel:
    """Build the model without weights, or a sample of it with one layer of each kind."""
    from transformers import AutoModelForCausalLM

    shapes = shapes_of(bundle)
    config = make_config(architecture, metadata, shapes, sample=sample)
    # SDPA has no soft cap; some releases of transformers choose it all the same and drop the cap.
    attention = {"attn_implementation": "eager"} if architecture.softcap_of_scores(config) else {}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)  # type: ignore[no-untyped-call]
    fit(model, architecture, shapes)
    suppressed = suppressed_tokens(metadata, config.vocab_size)
    cast("Any", model.generation_config).suppress_tokens = suppressed or None
    return model


def fit(model: PreTrainedModel, architecture: Architecture, shapes: Shapes) -> None:
    """Change modules of transformers' model on the meta device to those that the bundle fills.

    Args:
        model: the model, of the configuration that `make_config` returns.
        architecture: how the bundle's tensors differ from its parameters.
        shapes: shapes of the bundle's tensors, by name.
    """
    if architecture.adapt is not None:
        with torch.device("meta"):
            architecture.adapt(model)
    for name, module in list(model.named_modules()):
        if name.endswith(".linear_attn"):
            model.set_submodule(name, GatedDeltaNet(module))
    _fit_biases(model, architecture, shapes)
    attach(model, architecture)


def _fit_biases(model: PreTrainedModel, architecture: Architecture, shapes: Shapes) -> None:
    """Give biases to exactly those layers that have one in the bundle; classes of transformers know fewer cases."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    biases = [f"{name}.bias" for name in layers]
    names = gguf_names(architecture, biases, model.config.num_hidden_layers)
    for bias, layer in zip(biases, layers.values(), strict=True):
        stored = names[bias] in shapes
        if stored and layer.bias is None:
            empty = nn.Parameter(layer.weight.new_empty(layer.out_features), requires_grad=False)
            layer.register_parameter("bias", empty)
        elif not stored:
            layer.register_parameter("bias", None)
