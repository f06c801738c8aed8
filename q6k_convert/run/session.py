"""A bundle's model, opened in the order in which what is missing costs least: facts, packages, device, weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from q6k_convert import text
from q6k_convert.errors import UsageError
from q6k_convert.run.memory import free_bytes, loaded_sizes, model_memory, planned
from q6k_convert.run.running import (
    Activations,
    Cache,
    Device,
    Dtype,
    Weights,
    check_packages,
    described,
    device_of,
    dtype_of,
    name_of,
)
from q6k_kernels.bundle import manifest as manifests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

Note = Callable[[str], None]
Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class ModelRequest:
    """Which model runs, and how; see the options of the commands."""

    bundle: Path
    device: Device = "auto"
    dtype: Dtype = "auto"
    activations: Activations = "auto"
    weights: Weights = "auto"
    tokenizer: Path | None = None
    cache: Cache = "model"


class Session:
    """A bundle whose model is about to run, or runs.

    Attributes:
        request: the request.
        manifest: the bundle's manifest.
        metadata: the bundle's metadata.
        device: the device to run on.
        dtype: the dtype of activations.
        seconds: seconds of each stage so far.

    Args:
        request: the request.
        doing: what needs the packages, for the message.
        note: called with each line about the progress.

    Raises:
        EnvironmentMissingError: a package or the GPU is missing.
        UsageError: the options contradict each other.
        ModelError: no model can be made from the bundle.
        BundleError: the directory is not a bundle, or its files break the format.
        OSError: a file cannot be read.
    """

    def __init__(self, request: ModelRequest, doing: str, note: Note) -> None:
        self.request, self.note = request, note
        self.manifest = manifests.read(request.bundle)
        check_packages(doing)
        note(f"{request.bundle}: starting")  # importing what models take lasts seconds
        import torch

        from q6k_kernels.bundle.metadata import read_metadata
        from q6k_kernels.models.registry import architecture_of

        # Check the model first: the steps below take long or may fail for other reasons.
        self.metadata = read_metadata(request.bundle)
        architecture_of(self.metadata)
        device = device_of(request.device, note)
        self.device, self.dtype = torch.device(device), dtype_of(request.dtype, device)
        self.seconds = dict[str, float]()
        note(f"{request.bundle}: {name_of(self.dtype)} on {described(self.device)}")

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer."""
        from q6k_kernels.tokenizer.tokenizer import load_tokenizer

        with self.timed("tokenizer"):
            tokenizer = load_tokenizer(self.request.bundle, self.request.tokenizer)
        for line in tokenizer.vocabulary.notes:
            self.note(f"note: {line}")
        return tokenizer

    def memory(self, context: int | None) -> dict[str, Any]:
        """Return the memory that the model takes with a cache of so many tokens, see `memory.model_memory`."""
        sizes = loaded_sizes(self.manifest.tensors)
        codes = self.request.cache == "int8"
        return model_memory(self.metadata, sizes, context, self.dtype.itemsize, codes=codes)

    def model(self, context: int | None, progress: Progress, texts: int = 1) -> PreTrainedModel:
        """Say what memory the model takes with a cache of so many tokens, or without one, and load it.

        Args:
            context: tokens of a text, or None for no cache.
            progress: makes a progress display from a total in bytes and a label.
            texts: the texts at once.

        Raises:
            EnvironmentMissingError: see `memory.planned`.
            UsageError: see there, or the weights cannot have the form that is asked for.
            PackageMissingError: they cannot, as the compiled code for that is not installed.
        """
        import torch

        from q6k_kernels import load_model

        memory, free = self.memory(context), free_bytes(self.device)
        if plan := planned(memory, free, cached=context is not None, texts=texts):
            self.note(plan)
        request, total = self.request, sum(tensor.nbytes for tensor in self.manifest.tensors)
        form, why = self._form()
        if self.device.type == "cpu":
            self.note(f"weights: {why}")
        with progress(total, "loading") as tell, self.timed("load"):
            model = load_model(
                request.bundle,
                device=self.device,
                dtype=self.dtype,
                activations=request.activations,
                weights=form,
                progress=tell,
            )
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        held = sum({each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}.values())
        self.note(f"loaded {text.size(held)} of weights in {text.seconds(self.seconds['load'])}")
        return model

    def _form(self) -> tuple[Literal["packed", "bytes"], str]:
        """Choose the form of the weights, and say why."""
        from q6k_kernels.models.cpu_form import choose

        asked, tensors = self.request, self.manifest.tensors
        try:
            return choose(asked.weights, tensors, self.device.type, asked.activations)
        except ValueError as error:
            raise UsageError(str(error), "Leave --weights out.") from error

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the seconds of a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
