"""Chat with a bundle's model: messages in, answers out, and what both have in common with the turn before kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from q6k_convert import text
from q6k_convert.errors import InputRejectedError, Q6KConvertError, UsageError
from q6k_convert.run.answering import Answer, Answering, counted, rated
from q6k_convert.run.conversation import COMMANDS, Conversation, Shown
from q6k_convert.run.generate_command import check_context, check_ids, check_text
from q6k_convert.run.interruptions import Interruptions, StoppedError
from q6k_convert.run.running import name_of
from q6k_convert.run.sampling_request import SamplingRequest, settled
from q6k_convert.run.session import ModelRequest, Session
from q6k_kernels.errors import ModelError

if TYPE_CHECKING:
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

Row = dict[str, Any]
DEFAULT_CONTEXT = 8192
"""Positions of the cache where none are asked for, unless the model knows fewer."""


class Typed(Protocol):
    """Where messages come from.

    Attributes:
        interactive: whether somebody types them, who can be told what was wrong and go on.
    """

    interactive: bool

    def read(self) -> str | None:
        """Return the next message or command; None at the end."""


class Output(Protocol):
    """Where a chat shows what it has to show."""

    def stream(self, piece: str) -> None:
        """Show a piece of an answer."""

    def note(self, line: str) -> None:
        """Tell about the progress."""

    def error(self, cause: str, remedy: str = "") -> None:
        """Tell what was wrong, and what to do."""

    def progress(self, total: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
        """Make a progress display."""


@dataclass(frozen=True)
class ChatRequest:
    """Request of the command; see its options."""

    model: ModelRequest
    system: str | None = None
    max_new_tokens: int | None = None
    context: int | None = None
    sampling: SamplingRequest = field(default_factory=SamplingRequest)


def run(request: ChatRequest, typed: Typed, out: Output) -> Row:
    """Chat until the messages end, and return the document for `--json`.

    Args:
        request: request of the command.
        typed: the messages.
        out: where answers and all else are shown.

    Raises:
        UsageError: the options contradict each other; or what was not typed by somebody is no command, or too long.
        InputRejectedError: the chat template makes no tokens of a message.
        ModelError: there is no chat template or a broken one, or as by `Session`.
        Q6KConvertError, BundleError, OSError: see `Session`.
    """
    check_text("system message", request.system or "")
    session = Session(request.model, "chatting", out.note)
    sampling = settled(request.sampling, session.metadata, out.note)
    check_context(request.context, session.metadata)
    context = request.context or min(session.metadata.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    tokenizer = session.tokenizer()
    tokenizer.check_template()
    model = session.model(context, out.progress)
    generator = sampling.generator(model, context, request.model.cache)
    answering = Answering(generator, tokenizer, model, request.sampling.stop, out.stream)
    if session.device.type == "cuda":
        out.note("preparing kernels")
        with session.timed("prepare"):
            answering.prepare([0])
    chat = Chat(request, session, tokenizer, answering, out)
    with Interruptions() as interruptions:
        chat.run(typed, interruptions)
    return {
        "status": "done",
        "bundle": str(request.model.bundle),
        "architecture": session.manifest.architecture,
        "device": str(session.device),
        "dtype": name_of(session.dtype),
        "activations": request.model.activations,
        "cache": request.model.cache,
        "context": context,
        **sampling.settings,
        "messages": chat.conversation.messages,
        "turns": chat.turns,
        "seconds": session.seconds,
    }


class Chat:
    """A conversation and the model that takes part in it.

    Attributes:
        conversation: the messages.
        turns: what each answer took, for the document.
    """

    def __init__(
        self, request: ChatRequest, session: Session, tokenizer: Tokenizer, answering: Answering, out: Output
    ) -> None:
        self.conversation = Conversation(request.system)
        self.turns = list[Row]()
        self._most, self._session, self._tokenizer = request.max_new_tokens, session, tokenizer
        self._answering, self._generator, self._out = answering, answering.generator, out

    def run(self, typed: Typed, interruptions: Interruptions) -> None:
        """Answer every message until they end."""
        if typed.interactive:
            self._out.note("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
        tried = False
        while True:
            try:
                # Twice in a row, with nothing typed between, it ends the program.
                with interruptions.stopping() if typed.interactive and not tried else nullcontext():
                    given = typed.read()
            except StoppedError:
                tried = True
                self._out.note("")  # the line of ^C
                self._out.note("Ctrl-D or /exit ends the chat, as does Ctrl-C once more")
                continue
            if given is None or given.strip() == COMMANDS.end:
                return
            tried = False
            try:
                self._respond(given, interruptions)
            except (Q6KConvertError, ModelError) as error:
                if not typed.interactive:
                    raise
                self._out.error(error.cause, error.remedy)

    def _respond(self, given: str, interruptions: Interruptions) -> None:
        message = self.conversation.message(given)
        if isinstance(message, Shown):
            for line in message.lines:
                self._out.note(line)
        elif message.strip():
            self._answer(message, interruptions)

    def _answer(self, message: str, interruptions: Interruptions) -> None:
        try:
            with interruptions.stopping():
                ids = self._read(message)
        except StoppedError:
            self._out.note("stopped before the answer; the message is forgotten")
            return
        room = self._generator.capacity - len(ids)
        most = room if self._most is None else min(room, self._most)
        try:
            with interruptions.noting():
                answer = self._answering.answer(most, lambda: interruptions.asked)
        finally:
            self._out.stream("\n")
        self._note(ids, answer, full=len(answer.tokens) == room)
        if answer.text or answer.stop_reason != "interrupted":
            self.conversation.add(message, answer.text)

    def _read(self, message: str) -> list[int]:
        """Let the model read all messages and this one; return their tokens."""
        ids, generator = self._tokenizer.encode_chat(self.conversation.asked(message)), self._generator
        if not ids:
            raise InputRejectedError(
                "the chat template makes no tokens of the messages", "Give another one: --tokenizer DIR."
            )
        check_ids(self._session.manifest, ids)
        if len(ids) >= generator.capacity:
            raise UsageError(
                f"with this message the chat has {len(ids)} tokens, and the context holds {generator.capacity}",
                "Begin anew with /reset, or with more --context.",
            )
        complete = False
        try:
            with self._session.timed("prefill"):
                generator.resume(ids)
            complete = True
        finally:
            if not complete:
                generator.reset()  # the cache holds a part of the text
        return ids

    def _note(self, ids: list[int], answer: Answer, *, full: bool) -> None:
        reused, seconds = self._generator.reused, self._session.seconds["prefill"]
        row: Row = {
            "prompt_tokens": len(ids),
            "reused_tokens": reused,
            "generated_tokens": len(answer.tokens),
            "stop_reason": answer.stop_reason,
            "stop_text": answer.stop_text,
            "prefill_seconds": seconds,
            "decode_seconds": answer.seconds,
            "decode_tokens_per_second": answer.rate,
        }
        if answer.likelihoods is not None:
            row["logprobs"] = self._answering.shown(answer.likelihoods)
            for line in self._answering.lines(answer.likelihoods):
                self._out.note(line)
        self.turns.append(row)
        read = f"{text.plural(len(ids) - reused, 'token')} read in {text.seconds(seconds)}, {reused} known before"
        stopped = "; stopped" if answer.stop_reason == "interrupted" else ""
        self._out.note(f"({read}; answer: {counted(answer)}{rated(answer)}{stopped})")
        if full and answer.stop_reason == "length":
            held = text.plural(self._generator.capacity, "token")
            self._out.note(f"the context of {held} is full: /reset begins anew, --context makes room")
