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
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.formats.checks import Activations, check_activations, check_dtype
from q6k_kernels.models.counting import attach_counter
from q6k_kernels.models.cpu_form import Weights, choose, to_bytes
from q6k_kernels.models.filling import Filler
from q6k_kernels.models.registry import architecture_of
from q6k_kernels.models.resizing import attach_resizer
from q6k_kernels.models.saving import attach_saver
from q6k_kernels.models.skeleton import check_device, check_transformers, matched, skeleton
from q6k_kernels.weights.reader import open_bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str | int = "cpu",
    *,
    dtype: torch.dtype | None = None,
    activations: Activations = "auto",
    weights: Weights = "packed",
    progress: Callable[[int], None] = lambda _: None,
) -> PreTrainedModel:
    """Build the model that a bundle holds.

    Args:
        path: the bundle's directory, or its name on the Hugging Face Hub, ORG/REPO or ORG/REPO@REVISION.
        device: the CPU or a CUDA GPU.
        dtype: dtype of activations and unpacked weights: bfloat16, float16, or on the CPU float32. By default
            bfloat16 on a GPU, float32 on the CPU.
        activations: "int8", "bf16" or "auto", see `q6k_kernels.linear`.
        weights: "packed"; "bytes", a byte for each weight, in which a CPU decodes several times as fast; or "auto",
            see `cpu_form.choose`.
        progress: called after each tensor with its size in the bundle in bytes; the sum is that of all `nbytes` in
            `open_bundle(path).manifest.tensors`.

    Returns:
        A transformers model for causal language modelling, in eval mode, without gradients. Its
        `generation_config` has the ids that the GGUF names: BOS, padding, the ends of a text or a turn, and those
        that must never be chosen.
        `architecture.attached` returns the `Architecture` that it was built from. Its `save_pretrained` writes the
        bundle again, see `saving`.

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
    check_device(device, dtype)
    check_transformers()
    bundle = open_bundle(path)
    form, _ = choose(weights, bundle.manifest.tensors, device.type, activations)
    metadata = read_metadata(bundle.path)
    architecture = architecture_of(metadata)
    for unused in matched(bundle, metadata, architecture, dtype):
        progress(unused.nbytes)
    model = skeleton(bundle, metadata, architecture, dtype)
    Filler(model, bundle, architecture, lambda _: device, dtype, activations, progress).fill()
    if form == "bytes":
        to_bytes(model)
    attach_saver(model, bundle.path)
    attach_resizer(model)
    attach_counter(model)
    model.eval()  # type: ignore[no-untyped-call]
    return model
