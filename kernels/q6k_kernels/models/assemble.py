"""A whole model from a bundle: transformers' own classes, with packed weights wherever the bundle has them.

    model = load_model("out/", device="cuda")
    model.generate(ids, max_new_tokens=20)

Linear layers and embeddings with packed weights become `PackedLinear` and `PackedEmbedding`; projections that share
their input run as one (see `fusing`); a tied head shares the embedding's memory. All other weights are cast to
`dtype`, since transformers' layers want weights and activations of one dtype.

All names and shapes are compared with the bundle's before the model is built (see `matching`). It is built on the
meta device, where nothing takes memory. Then one tensor at a time goes from its file to its device (see `filling`).
Encoders of images or sound, and blocks that predict several tokens at once, which some files hold beside a model
of text, are left where they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn

from q6k_kernels.bundle.metadata import Metadata, read_metadata
from q6k_kernels.errors import PackageMissingError, UnsupportedModelError
from q6k_kernels.formats.checks import Activations, check_activations, check_dtype
from q6k_kernels.models.architecture import Architecture, attach, gguf_names, kinds_of_layers, make_config
from q6k_kernels.models.delta_net import GatedDeltaNet
from q6k_kernels.models.filling import Filler
from q6k_kernels.models.hyperparameters import Shapes
from q6k_kernels.models.matching import check_tensors
from q6k_kernels.models.registry import architecture_of
from q6k_kernels.models.sizes import suppressed_tokens
from q6k_kernels.weights.reader import Bundle, open_bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OLDEST_TRANSFORMERS = (5, 17)
"""The oldest supported release of transformers."""


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str | int = "cpu",
    *,
    dtype: torch.dtype | None = None,
    activations: Activations = "auto",
    progress: Callable[[int], None] = lambda _: None,
) -> PreTrainedModel:
    """Build the model that a bundle holds.

    Args:
        path: the bundle's directory, or its name on the Hugging Face Hub, ORG/REPO or ORG/REPO@REVISION.
        device: the CPU or a CUDA GPU.
        dtype: dtype of activations and unpacked weights: bfloat16, float16, or on the CPU float32. By default
            bfloat16 on a GPU, float32 on the CPU.
        activations: "int8", "bf16" or "auto", see `q6k_kernels.linear`.
        progress: called after each tensor with its size in the bundle in bytes; the sum is that of all `nbytes` in
            `open_bundle(path).manifest.tensors`.

    Returns:
        A transformers model for causal language modelling, in eval mode, without gradients. Its
        `generation_config` has the ids that the GGUF names: BOS, padding, the ends of a text or a turn, and those
        that must never be chosen.
        `architecture.attached` returns the `Architecture` that it was built from. Its `save_pretrained` raises
        UnsupportedModelError: transformers could not load what it writes.

    Raises:
        PackageMissingError: transformers is missing or too old.
        UnsupportedModelError: the architecture, or an option of it, is not supported.
        HyperparameterError: a key of the metadata is missing, impossible, or contradicts the tensors.
        WeightsError: a tensor of the model is missing, of the wrong shape, left out, or raw GGUF blocks; or one is
            neither the model's nor one that it does without.
        BundleError: the directory is not a bundle, or breaks the rules of the format.
        ValueError: an argument has none of the values above.
        OSError: a file cannot be read.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_dtype(dtype)
    check_activations(activations)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and dtype is torch.float32):
        raise ValueError(f"expected a CPU, or a GPU with bfloat16 or float16, found {dtype} on {device}")
    _check_transformers()
    bundle = open_bundle(path)
    metadata = read_metadata(bundle.path)
    architecture = architecture_of(metadata)
    sample = _on_meta(bundle, metadata, architecture, dtype, sample=True)
    kinds = kinds_of_layers(make_config(architecture, metadata, _shapes(bundle)).to_dict())
    for unused in check_tensors(bundle, metadata, architecture, sample, kinds):
        progress(unused.nbytes)
    model = _on_meta(bundle, metadata, architecture, dtype)
    Filler(model, bundle, architecture, device, dtype, activations, progress).fill()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _check_transformers() -> None:
    wanted = ".".join(map(str, OLDEST_TRANSFORMERS))
    remedy = "Install it: `pip install 'q6k-convert[inference]'`."
    try:
        from transformers import __version__
    except ImportError as error:
        raise PackageMissingError(f"transformers {wanted} or later is needed: {error}", remedy) from error
    if tuple(map(int, re.findall(r"\d+", __version__)[:2])) < OLDEST_TRANSFORMERS:
        raise PackageMissingError(f"transformers {wanted} or later is needed, found {__version__}", remedy)


def _shapes(bundle: Bundle) -> Shapes:
    return {tensor.name: tuple(tensor.shape) for tensor in bundle.manifest.tensors}


def _on_meta(
    bundle: Bundle, metadata: Metadata, architecture: Architecture, dtype: torch.dtype, *, sample: bool = False
) -> PreTrainedModel:
    """Build the model without weights, or a sample of it with one layer of each kind."""
    from transformers import AutoModelForCausalLM

    shapes = _shapes(bundle)
    config = make_config(architecture, metadata, shapes, sample=sample)
    # SDPA has no soft cap; some releases of transformers choose it all the same and drop the cap.
    attention = {"attn_implementation": "eager"} if architecture.softcap_of_scores(config) else {}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)  # type: ignore[no-untyped-call]
        if architecture.adapt is not None:
            architecture.adapt(model)
    for name, module in list(model.named_modules()):
        if name.endswith(".linear_attn"):
            model.set_submodule(name, GatedDeltaNet(module))
    _fit_biases(model, architecture, shapes)
    attach(model, architecture)
    suppressed = suppressed_tokens(metadata, config.vocab_size)
    cast("Any", model.generation_config).suppress_tokens = suppressed or None
    model.__dict__["save_pretrained"] = _refuse_to_save
    return model


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


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    """Take the place of `save_pretrained`, whose files would load with random weights and no more than a notice."""
    raise UnsupportedModelError(
        "models from load_model cannot be saved with save_pretrained, which knows no packed weights",
        "The bundle is the saved model: copy it. `torch.save` keeps a model whose weights were changed.",
    )
