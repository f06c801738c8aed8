"""Generate text with a bundle's model: tokenizer, model, prefill, decode, and the time of each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import InputRejectedError, UsageError
from q6k_convert.run.answering import Answer, Answering, counted, rated
from q6k_convert.run.running import name_of
from q6k_convert.run.sampling_request import Sampling, SamplingRequest, settled
from q6k_convert.run.session import ModelRequest, Progress, Session
from q6k_kernels.bundle import manifest as manifests

if TYPE_CHECKING:
    from q6k_kernels.bundle.metadata import Metadata
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

MAX_PROMPT_BYTES = 1 << 24
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class GenerateRequest:
    """Request of the command; see its options."""

    model: ModelRequest
    prompt: str | None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 128
    context: int | None = None
    sampling: SamplingRequest = field(default_factory=SamplingRequest)


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
    session = Session(request.model, "generating", note)
    sampling = settled(request.sampling, session.metadata, note)
    tokenizer = session.tokenizer()
    ids = _encoded(request, tokenizer, prompt)
    check_ids(session.manifest, ids)
    capacity = _capacity(request, session.metadata, len(ids))
    model = session.model(capacity, progress)
    generator = sampling.generator(model, capacity, request.model.cache)
    answering = Answering(generator, tokenizer, model, request.sampling.stop, write)
    if session.device.type == "cuda":
        note("preparing kernels")
        with session.timed("prepare"):
            answering.prepare(ids, request.max_new_tokens)
    note(f"reading the prompt, {text.plural(len(ids), 'token')}")
    with session.timed("prefill"):
        answering.generator.prefill(ids)  # waits for the logits
    try:
        answer = answering.answer(request.max_new_tokens)
    finally:
        # Also if interrupted, so that the next message begins on a new line.
        write("\n")
    session.seconds["decode"] = answer.seconds
    document = _document(request, session, sampling, ids, answer)
    note(
        f"prompt: {text.plural(len(ids), 'token')} in {text.seconds(session.seconds['prefill'])}, "
        f"{document['prefill_tokens_per_second']:.1f} tokens/s"
    )
    note(f"answer: {counted(answer)}; decoding took {text.seconds(answer.seconds)}{rated(answer)}")
    if answer.likelihoods is not None:
        document["logprobs"] = answering.shown(answer.likelihoods)
        for line in answering.lines(answer.likelihoods):
            note(line)
    return document


def _document(
    request: GenerateRequest, session: Session, sampling: Sampling, ids: list[int], answer: Answer
) -> dict[str, Any]:
    return {
        "status": "done",
        "bundle": str(request.model.bundle),
        "architecture": session.manifest.architecture,
        "device": str(session.device),
        "dtype": name_of(session.dtype),
        "activations": request.model.activations,
        "cache": request.model.cache,
        **sampling.settings,
        "text": answer.text,
        "stop_reason": answer.stop_reason,
        "stop_text": answer.stop_text,
        "prompt_token_ids": ids,
        "token_ids": answer.tokens,
        "prompt_tokens": len(ids),
        "generated_tokens": len(answer.tokens),
        "seconds": session.seconds,
        "prefill_tokens_per_second": len(ids) / session.seconds["prefill"],
        "decode_tokens_per_second": answer.rate,
    }


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
    check_text("prompt", prompt)
    check_text("system message", request.system or "")
    return prompt


def check_text(what: str, given: str) -> None:
    """Check that a text of the command line is Unicode.

    Raises:
        UsageError: it holds bytes that are not UTF-8.
    """
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the {what} is not UTF-8, at character {error.start}", "Write it in UTF-8.") from error


def _encoded(request: GenerateRequest, tokenizer: Tokenizer, prompt: str) -> list[int]:
    if request.chat:
        system = [] if request.system is None else [{"role": "system", "content": request.system}]
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens", "Give a longer one.")
    return ids


def check_ids(manifest: manifests.Manifest, ids: list[int]) -> None:
    """Check that the model knows all tokens: a vocabulary can be larger than the embedding."""
    rows = next((each.shape[0] for each in manifest.tensors if each.name == EMBEDDING and each.shape), None)
    if rows is not None and max(ids) >= rows:
        raise InputRejectedError(
            f"the prompt has the token {max(ids)}, and {EMBEDDING} has {rows} rows",
            "Give the tokenizer that belongs to the model, or none: --tokenizer.",
        )


def _capacity(request: GenerateRequest, metadata: Metadata, prompt: int) -> int:
    """Return the positions of the cache: as many as are asked for, else as many as are needed."""
    new, known = request.max_new_tokens, metadata.context_length
    check_context(request.context, metadata)
    longest = request.context if request.context is not None else known
    holder = "the model knows" if request.context is None else "--context is"
    if longest is not None and prompt + new > longest:
        raise UsageError(
            f"{prompt} tokens of prompt and {new} new ones are {prompt + new}, and {holder} {longest} positions",
            f"Give a shorter prompt, or --max-new-tokens {longest - prompt}."
            if longest > prompt
            else "Give a shorter prompt.",
        )
    return request.context or prompt + new


def check_context(context: int | None, metadata: Metadata) -> None:
    """Check that the model knows all positions of a context.

    Raises:
        UsageError: it knows fewer.
    """
    known = metadata.context_length
    if context is not None and known is not None and context > known:
        raise UsageError(f"--context {context}: the model knows {known} positions", f"Give {known} or less.")
