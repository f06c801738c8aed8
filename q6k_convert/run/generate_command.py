"""Generate text with a bundle's model: tokenizer, model, prefill, decode, and the time of each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import InputRejectedError, UsageError
from q6k_convert.run.running import (
    Activations,
    Device,
    Dtype,
    check_packages,
    described,
    device_of,
    dtype_of,
    name_of,
)
from q6k_kernels.bundle import manifest as manifests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from q6k_kernels.bundle.metadata import Metadata
    from q6k_kernels.generate.generator import Generator
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
MAX_PROMPT_BYTES = 1 << 24
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class GenerateRequest:
    """Request of the command; see its options."""

    bundle: Path
    prompt: str | None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    activations: Activations = "auto"
    tokenizer: Path | None = None


def run(
    request: GenerateRequest, write: Callable[[str], None], note: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Generate text, and return the document for `--json`.

    Args:
        request: request of the command.
        write: called with each piece of the answer, and a last line break.
        note: called with each line about the progress.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        UsageError: the options contradict each other, or the text is too long for the model.
        InputRejectedError: the tokenizer has tokens that the model does not know.
        EnvironmentMissingError: a package or the GPU is missing.
        ModelError: no model or tokenizer can be made from the bundle.
        BundleError: the directory is not a bundle, or its files break the format.
        OSError: a file cannot be read.
    """
    prompt = _prompt(request)
    manifest = manifests.read(request.bundle)
    check_packages("generating")
    note(f"{request.bundle}: starting")  # importing what models take lasts seconds
    from q6k_kernels.bundle.metadata import read_metadata
    from q6k_kernels.models.registry import architecture_of

    # Check the model first: the steps below take long or may fail for other reasons.
    metadata = read_metadata(request.bundle)
    architecture_of(metadata)
    device = device_of(request.device, note)
    run = _Generation(request, prompt, device, write, note)
    _check_ids(manifest, run.ids)
    _check_length(metadata, len(run.ids), request.max_new_tokens)
    return run.document(manifest, progress)


class _Generation:
    def __init__(
        self,
        request: GenerateRequest,
        prompt: str,
        device: str,
        write: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        import torch

        self.request, self.write, self.note = request, write, note
        self.device = torch.device(device)
        self.dtype = dtype_of(request.dtype, device)
        self.seconds = dict[str, float]()
        note(f"{request.bundle}: {name_of(self.dtype)} on {described(self.device)}")
        with self._timed("tokenizer"):
            self.tokenizer, self.ids = _tokenized(request, prompt)
        for line in self.tokenizer.vocabulary.notes:
            note(f"note: {line}")

    def document(self, manifest: manifests.Manifest, progress: Progress) -> dict[str, Any]:
        """Load, prefill and decode, and return the document."""
        request = self.request
        with progress(sum(tensor.nbytes for tensor in manifest.tensors), "loading") as tell, self._timed("load"):
            model = self._model(tell)
        generator, stop = self._generator(model)
        self.note(f"reading the prompt, {text.plural(len(self.ids), 'token')}")
        with self._timed("prefill"):
            generator.prefill(self.ids)  # waits for the logits
        answer, pieces = list[int](), list[str]()
        stream = self.tokenizer.stream()

        def put(piece: str) -> None:
            if piece:
                pieces.append(piece)
                self.write(piece)

        try:
            with self._timed("decode"):
                for token in generator.generate(request.max_new_tokens, stop):
                    answer.append(token)
                    put(stream.push(token))
            put(stream.end())
        finally:
            # Also if interrupted, so that the next message begins on a new line.
            self.write("\n")
        stopped = generator.stop_reason == "stop"
        steps = len(answer) - 1 + stopped
        rates = {
            "prefill_tokens_per_second": len(self.ids) / self.seconds["prefill"],
            "decode_tokens_per_second": steps / self.seconds["decode"] if steps > 0 else None,
        }
        self._summary(len(answer), steps, rates)
        return {
            "status": "done",
            "bundle": str(request.bundle),
            "architecture": manifest.architecture,
            "device": str(self.device),
            "dtype": name_of(self.dtype),
            "activations": request.activations,
            "temperature": request.temperature,
            "seed": request.seed,
            "text": "".join(pieces),
            "stop_reason": generator.stop_reason,
            "prompt_token_ids": self.ids,
            "token_ids": answer,
            "prompt_tokens": len(self.ids),
            "generated_tokens": len(answer),
            "seconds": self.seconds,
            **rates,
        }

    def _model(self, progress: Callable[[int], None]) -> PreTrainedModel:
        import torch

        from q6k_kernels import load_model

        model = load_model(
            self.request.bundle,
            device=self.device,
            dtype=self.dtype,
            activations=self.request.activations,
            progress=progress,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return model

    def _generator(self, model: PreTrainedModel) -> tuple[Generator, frozenset[int]]:
        from q6k_kernels.generate.generator import Generator

        request = self.request
        held = sum({each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}.values())
        self.note(f"loaded {text.size(held)} of weights in {text.seconds(self.seconds['load'])}")
        generator = Generator(
            model,
            capacity=len(self.ids) + request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        if self.device.type == "cuda":
            self.note("preparing kernels")
            with self._timed("prepare"):
                # This first prefill compiles the kernels; only the later one is timed.
                generator.prefill(self.ids)
                generator.prepare(request.max_new_tokens)
                generator.reset()
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return generator, self.tokenizer.stop_ids | frozenset(ends)

    def _summary(self, generated: int, steps: int, rates: dict[str, Any]) -> None:
        seconds = self.seconds
        self.note(
            f"prompt: {text.plural(len(self.ids), 'token')} in {text.seconds(seconds['prefill'])}, "
            f"{rates['prefill_tokens_per_second']:.1f} tokens/s"
        )
        rate = f", {rates['decode_tokens_per_second']:.1f} tokens/s" if steps > 0 else ""
        self.note(
            f"answer: {text.plural(generated, 'token')}; decoding took {text.seconds(seconds['decode'])}{rate}"
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _prompt(request: GenerateRequest) -> str:
    if request.prompt is None:
        raise UsageError("there is no prompt", "Give one: --prompt TEXT, or --prompt - to read it from stdin.")
    if request.system is not None and not request.chat:
        raise UsageError("--system needs --chat", "Give both, or put all of it into --prompt.")
    if request.prompt != "-":
        prompt = request.prompt
    else:
        raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(raw) > MAX_PROMPT_BYTES:
            raise UsageError(f"the prompt on stdin is longer than {text.size(MAX_PROMPT_BYTES)}")
        try:
            prompt = raw.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on stdin is not UTF-8: {error.reason} at byte {error.start}") from error
    for what, given in (("prompt", prompt), ("system message", request.system or "")):
        try:
            given.encode()
        except UnicodeEncodeError as error:  # the command line holds bytes that are not UTF-8
            raise UsageError(f"the {what} is not UTF-8, at character {error.start}") from error
    return prompt


def _tokenized(request: GenerateRequest, prompt: str) -> tuple[Tokenizer, list[int]]:
    from q6k_kernels.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(request.bundle, request.tokenizer)
    if request.chat:
        system = [] if request.system is None else [{"role": "system", "content": request.system}]
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens", "Give a longer one.")
    return tokenizer, ids


def _check_ids(manifest: manifests.Manifest, ids: list[int]) -> None:
    """Check that the model knows all tokens: a vocabulary can be larger than the embedding."""
    rows = next((each.shape[0] for each in manifest.tensors if each.name == EMBEDDING and each.shape), None)
    if rows is not None and max(ids) >= rows:
        raise InputRejectedError(
            f"the prompt has the token {max(ids)}, and {EMBEDDING} has {rows} rows",
            "Give the tokenizer that belongs to the model, or none: --tokenizer.",
        )


def _check_length(metadata: Metadata, prompt: int, new: int) -> None:
    longest = metadata.context_length
    if longest is not None and prompt + new > longest:
        raise UsageError(
            f"{prompt} tokens of prompt and {new} new ones are {prompt + new}, and the model knows {longest} "
            "positions",
            f"Give a shorter prompt, or --max-new-tokens {longest - prompt}."
            if longest > prompt
            else "Give a shorter prompt.",
        )
