"""The choice between our own steps and chunks and the forward pass of transformers' model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate.chunk_recording import ChunkRecorder
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.operations import StepOperations
from q6k_kernels.generate.step import Step
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.models.ranks import all_agree, is_divided

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_CODES = "Take a cache of the model's dtype: cache_type='model', or leave --cache out."


def step_for(
    model: PreTrainedModel,
    cache: KeyValueCache,
    device: torch.device,
    fused: bool | None,
    *,
    persistent: bool = False,
) -> Step | None:
    """Return our own step for a model; None where transformers' forward pass is to be used.

    Args:
        model: the model.
        cache: its cache.
        device: where it is.
        fused: whether the step has to be ours; None: on a GPU, if there are kernels for it, and always for a cache
            of codes, which transformers' layers cannot read.
        persistent: whether a step has to be a single launch, see `persist_cuda`.

    Raises:
        UnsupportedModelError: it has to be ours, and cannot.
    """
    coded = cache.cache_type != "model"
    if coded and fused is False:
        raise UnsupportedModelError("transformers' forward pass reads no cache of int8", _NO_CODES)
    fused = True if coded or persistent else fused
    on_gpu, narrow = device.type == "cuda", model.dtype in (torch.bfloat16, torch.float16)
    if not (on_gpu and narrow if fused is None else fused):
        return None
    operations: StepOperations = TorchOperations()
    of_chunks = of_texts = operations
    if persistent and (not on_gpu or is_divided(model)):
        raise UnsupportedModelError(
            "a persistent kernel runs a whole model on one GPU", "Generate without persistent=True."
        )
    whole = recorder = None
    if on_gpu:
        if not narrow:
            raise UnsupportedModelError(
                f"no fused decoding step on a GPU for {model.dtype}: there are bfloat16 and float16",
                _NO_CODES if coded else "Generate with fused=False.",
            )
        from q6k_kernels.generate.chunk_cuda import ChunkKernels
        from q6k_kernels.generate.persist_cuda import PersistentStep
        from q6k_kernels.generate.step_cuda import Kernels
        from q6k_kernels.generate.texts_cuda import TextKernels

        operations = kernels = Kernels(device, model.dtype, len(cache.position))
        of_chunks = ChunkKernels(device, model.dtype, kernels)
        of_texts = TextKernels(device, model.dtype, kernels)
        if of_chunks.on_hopper and not is_divided(model):
            recorder = ChunkRecorder(ChunkKernels(device, model.dtype, kernels, recorded=True), device)
        whole = PersistentStep(device, model.dtype) if persistent else None
    step, failure = None, None
    try:
        step = Step(model, cache, operations, of_chunks, of_texts, whole, recorder)
    except UnsupportedModelError as error:
        failure = error
    if is_divided(model) and not all_agree(failure is None, device) and failure is None:
        step, failure = None, UnsupportedModelError("no fused decoding step on other ranks", "See their errors.")
    if fused and failure is not None:
        raise UnsupportedModelError(failure.cause, _NO_CODES) if coded else failure
    return step
