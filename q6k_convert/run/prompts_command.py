"""Answer a file of prompts, several at once: `generate --prompts FILE --out FILE`."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import UsageError
from q6k_convert.run.answer_lines import Answers, answers_to
from q6k_convert.run.answering import Writing, stop_ids
from q6k_convert.run.generate_command import check_context, check_ids, check_text
from q6k_convert.run.memory import free_bytes
from q6k_convert.run.places import STDIN, STDOUT, named
from q6k_convert.run.prompt_lines import LineDefaults, LineProblems, PromptLine, read_lines
from q6k_convert.run.running import name_of
from q6k_convert.run.sampling_request import SamplingRequest, drawn_by, settled
from q6k_convert.run.session import ModelRequest, Progress, Session
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.errors import ModelError

if TYPE_CHECKING:
    from q6k_kernels.generate.texts import Text, Texts
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

MOST_TEXTS = 32
TEXTS_ON_CPU = 8
"""Texts at once where the command line does not say: on a GPU as many as its memory allows."""
NOTE_SECONDS = 5.0
"""Between two lines of progress."""


@dataclass(frozen=True)
class PromptsRequest:
    """Request of the command; see its options."""

    model: ModelRequest
    prompts: Path
    out: Path
    texts: int | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 128
    context: int | None = None
    sampling: SamplingRequest = field(default_factory=SamplingRequest)


@dataclass
class _Prepared:
    """A line that is ready to join."""

    line: PromptLine
    ids: list[int]


def run(
    request: PromptsRequest, show: Callable[[str], None], note: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Answer all lines that have no answer yet, and return the document for `--json`.

    Args:
        request: request of the command.
        show: called with each line of an output that is standard output.
        note: called with each line about the progress.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        UsageError: the options contradict each other.
        InputRejectedError: lines of the file are wrong, or too long for the model. Nothing has been written.
        IOFailedError: the output is of other prompts or settings, or another run is writing it.
        EnvironmentMissingError: a package or the GPU is missing.
        ModelError: no model or tokenizer can be made from the bundle, or it cannot continue several texts.
        BundleError: the directory is not a bundle, or its files break the format.
        OSError: a file cannot be read or written.
    """
    _check(request)
    session = Session(request.model, "generating", note)
    check_context(request.context, session.metadata)
    sampling = settled(request.sampling, session.metadata, note)
    settings = {**sampling.settings, "max_new_tokens": request.max_new_tokens}
    lines = read_lines(request.prompts, LineDefaults(settings, request.sampling.stop, request.chat, request.system))
    tokenizer = session.tokenizer()
    prepared = _encoded(request, session, tokenizer, lines)
    model_digest = hashlib.sha256((request.model.bundle / manifests.NAME).read_bytes()).hexdigest()
    # As they were asked for: "auto" may mean another dtype on the machine where the run goes on.
    asked = f"{model_digest} {request.model.cache} {request.model.dtype} {request.model.activations}"
    # And the tokens, which another tokenizer may make.
    digests = [each.line.digest(f"{asked} {each.ids}") for each in prepared]
    out, answers = named(request.out), answers_to(request.out, digests, show)
    try:
        if answers.torn:
            note(f"{out}: dropped a torn last line of {text.size(answers.torn)}")
        before = len(answers)
        if before:
            note(f"{out}: {before} of {text.plural(len(lines), 'line')} are there already")
        if answers.retried:
            note(f"{out}: {text.plural(answers.retried, 'line')} that failed: tried again")
        counts = _Counts()
        if not answers.complete:
            todo = [each for each in prepared if each.line.number not in answers]
            capacity = request.context or max(len(each.ids) + each.line.limit for each in todo)
            places = min(len(todo), request.texts or _places(session, capacity))
            model = session.model(capacity, progress, places)
            from q6k_kernels.generate.texts import Texts

            texts = Texts(model, capacity=capacity, places=places, cache_type=request.model.cache)
            note(f"answering {text.plural(len(todo), 'line')}, {places} at once")
            with session.timed("answers"):
                _answer(
                    texts, tokenizer, stop_ids(tokenizer, model), todo, answers, _Telling(counts, len(todo), note)
                )
    finally:
        answers.close()
    document = _document(request, session, len(lines), before, answers.failed, counts)
    note(f"{out}: {text.plural(len(lines), 'line')}, {len(lines) - before} of them new{counts.rated}")
    if answers.failed:
        listed = ", ".join(map(str, answers.failed[:10])) + (", …" if len(answers.failed) > 10 else "")
        note(f"{text.plural(len(answers.failed), 'line')} failed, see `error` there: {listed}")
    return document


@dataclass
class _Counts:
    """What a run has done."""

    lines: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rated(self) -> str:
        """The speed, for people, or nothing."""
        return f"; {self.tokens / self.seconds:.1f} tokens/s" if self.tokens and self.seconds else ""


class _Telling:
    """Counts, and tells the progress every few seconds."""

    def __init__(self, counts: _Counts, total: int, note: Callable[[str], None]) -> None:
        self.counts, self._total, self._note = counts, total, note
        self._start = self._last = time.monotonic()

    def tell(self, tokens: int = 0, lines: int = 0) -> None:
        """Count tokens and lines."""
        counts, now = self.counts, time.monotonic()
        counts.tokens, counts.lines, counts.seconds = (
            counts.tokens + tokens,
            counts.lines + lines,
            now - self._start,
        )
        if now - self._last >= NOTE_SECONDS:
            self._last = now
            left = counts.seconds / counts.lines * (self._total - counts.lines) if counts.lines else None
            after = "" if left is None else f", {text.seconds(left)} left"
            self._note(f"answers: {counts.lines} of {text.plural(self._total, 'line')}{counts.rated}{after}")


def _answer(
    texts: Texts,
    tokenizer: Tokenizer,
    ends: frozenset[int],
    lines: list[_Prepared],
    answers: Answers,
    telling: _Telling,
) -> None:
    """Answer lines, each as soon as there is a place for it."""
    todo = deque(lines)
    under_way: dict[Text, tuple[_Prepared, Writing]] = {}

    def put(one: _Prepared, content: dict[str, Any]) -> None:
        named = {"id": one.line.given["id"]} if "id" in one.line.given else {}
        answers.put(one.line.number, named | content)
        telling.tell(lines=1)

    def finish(each: Text, reason: str, *, complete: bool) -> None:
        one, writing = under_way.pop(each)
        answer = writing.end(reason, complete=complete)
        words = {"text": answer.text, "stop_reason": answer.stop_reason, "stop_text": answer.stop_text}
        counted = {"prompt_tokens": len(one.ids), "generated_tokens": len(answer.tokens)}
        put(one, words | counted | {"token_ids": answer.tokens})

    while todo or under_way:
        while todo and texts.free:
            one = todo.popleft()
            settings = {name: value for name, value in one.line.settings.items() if name != "max_new_tokens"}
            try:
                joined = texts.join(one.ids, one.line.limit, stop=ends, **drawn_by(settings))
            except ModelError as error:  # of this text alone: its logits are not finite
                put(one, {"error": error.cause})
            else:
                under_way[joined] = one, Writing(tokenizer, one.line.stop)
        for each, token in texts.step():
            if each not in under_way:
                continue  # a stop text has ended it
            if token is None:
                finish(each, each.stop_reason or "length", complete=True)
                continue
            telling.tell(tokens=1)
            if under_way[each][1].push(token):
                texts.leave(each)
                finish(each, "stop", complete=False)


def _check(request: PromptsRequest) -> None:
    if request.system is not None and not request.chat:
        raise UsageError("--system needs --chat", "Give both, or a message of the system in each line.")
    if request.sampling.logprobs is not None:
        raise UsageError("--logprobs is for one --prompt, not for --prompts", "Leave it out.")
    check_text("system message", request.system or "")
    files = request.out != STDOUT and request.prompts != STDIN
    if files and request.out.exists() and request.prompts.exists() and request.out.samefile(request.prompts):
        raise UsageError(f"--prompts and --out are the same file, {request.out}", "Give another --out.")


def _encoded(
    request: PromptsRequest, session: Session, tokenizer: Tokenizer, lines: list[PromptLine]
) -> list[_Prepared]:
    """Return lines with their tokens, which fit the model and the cache."""
    found, problems = list[_Prepared](), LineProblems(request.prompts)
    known = session.metadata.context_length
    longest = request.context if request.context is not None else known
    holder = "the model knows" if request.context is None else "--context is"
    with session.timed("tokens"):
        for line in lines:
            with problems.of(line.number):
                ids = line.encoded(tokenizer)
                if not ids:
                    raise ValueError("the prompt has no tokens")
                check_ids(session.manifest, ids)
                if longest is not None and len(ids) + line.limit > longest:
                    raise ValueError(
                        f"{len(ids)} tokens of prompt and {line.limit} new ones are {len(ids) + line.limit}, and "
                        f"{holder} {longest} positions"
                    )
                found.append(_Prepared(line, ids))
    problems.check()
    return found


def _places(session: Session, capacity: int) -> int:
    """Return how many texts to continue at once: on a GPU as many as its memory allows."""
    free = free_bytes(session.device)
    if free is None:
        return TEXTS_ON_CPU
    memory = session.memory(capacity)
    room = free - memory["weights_bytes"] - memory["prompt_bytes"]
    return max(1, min(MOST_TEXTS, int(0.9 * room) // max(1, memory["cache_bytes"] or 1)))


def _document(
    request: PromptsRequest, session: Session, lines: int, before: int, failed: list[int], counts: _Counts
) -> dict[str, Any]:
    return {
        "status": "failed" if failed else "done",
        "bundle": str(request.model.bundle),
        "architecture": session.manifest.architecture,
        "device": str(session.device),
        "dtype": name_of(session.dtype),
        "activations": request.model.activations,
        "cache": request.model.cache,
        "prompts": str(request.prompts),
        "out": str(request.out),
        "lines": lines,
        "lines_before": before,
        "lines_new": lines - before,
        "failed_lines": failed,
        "generated_tokens": counts.tokens,
        "seconds": session.seconds,
        "tokens_per_second": counts.tokens / counts.seconds if counts.seconds else None,
    }
