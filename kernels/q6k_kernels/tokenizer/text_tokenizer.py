"""Text to token ids and back, by a vocabulary and a chat template.

Text from a user never becomes a control token: "<end_of_turn>" in a prompt or a message is plain text. Only the
chat template itself can insert control tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from q6k_kernels.tokenizer import chat
from q6k_kernels.tokenizer.finder import Finder
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from q6k_kernels.tokenizer.vocabulary import Vocabulary

Messages = Sequence[Mapping[str, str]]

_BLANKS = " \t\n\v\f\r"
_NAMED = ("bos", "eos", "unk", "pad")
"""Special tokens that templates know by name."""
# Noncharacters, which Unicode reserves for internal use; they mark places in messages.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Tokenizer:
    """A vocabulary and a chat template.

    Attributes:
        vocabulary: the tokens and the encoder.
        chat_template: the Jinja text; None if the file has none.
    """

    def __init__(self, vocabulary: Vocabulary, chat_template: str | None) -> None:
        self.vocabulary = vocabulary
        self.chat_template = chat_template

    def __len__(self) -> int:
        return len(self.vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text; None if the file names none."""
        return self.vocabulary.names.get("bos")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self.vocabulary.stop

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that is to be continued; no part becomes a control token.

        It begins with BOS if the file says so. It never ends with EOS, which is for texts that a model learns from.

        Raises:
            TokenizerError: the text is longer than `vocabulary.MAX_TEXT`, or no Unicode.
        """
        vocabulary = self.vocabulary
        return [*([vocabulary.names["bos"]] if vocabulary.add_bos else []), *vocabulary.encode(text)]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Return the token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: each with `role` ("system", "user", "assistant") and `content`.

        Raises:
            TokenizerError: there is no chat template, or it fails, refuses the messages or drops a system message.
        """
        ids = self._encode_rendered(messages)
        bos = self.vocabulary.names.get("bos")
        # Most templates write BOS themselves.
        return [bos, *ids] if bos is not None and self.vocabulary.add_bos and ids[:1] != [bos] else ids

    def check_template(self) -> None:
        """Check that there is a chat template, and that it is one of Jinja.

        Raises:
            TokenizerError: there is none, or it is not.
        """
        try:
            chat.check_syntax(self._template)
        except chat.TemplateError as error:
            raise TokenizerError(str(error), "Give a tokenizer that has another one (--tokenizer DIR).") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens. Control tokens have none; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._piece(token) for token in ids).decode(errors="replace")

    def stream(self) -> TextStream:
        """Return a new decoder for tokens that arrive one at a time."""
        return TextStream(self)

    def _piece(self, token: int) -> bytes:
        # A model can have more rows than the vocabulary has tokens.
        return self.vocabulary.pieces[token] if 0 <= token < len(self.vocabulary.pieces) else b""

    @cached_property
    def _finder(self) -> Finder:
        return Finder(self.vocabulary.control)

    def _encode_rendered(self, messages: Messages) -> list[int]:
        mark = self._unused_marks(messages)[0]
        hidden = [{key: self._finder.hidden(value, mark) for key, value in each.items()} for each in messages]
        text, vocabulary = self._render(hidden), self.vocabulary
        ids, at, swallowing = list[int](), 0, False
        for begin, end, token in (*self._finder.find(text), (len(text), len(text), None)):
            if text[end : end + 1] == mark:
                continue  # from a message: a token of one character
            part = text[at:begin].replace(mark, "")
            ids += vocabulary.encode(part.lstrip(_BLANKS) if swallowing else part)
            if token is not None:
                ids.append(token)
                at, swallowing = end, token in vocabulary.swallowing
        return ids

    def _render(self, messages: Messages) -> str:
        template = self._template
        names, control = self.vocabulary.names, {i: token for token, i in self.vocabulary.control.items()}
        variables = {f"{name}_token": control[names[name]] for name in _NAMED if names.get(name) in control}
        # A second rendering, with a mark behind each system message, shows whether the template drops one, as some
        # do without a word. In the text that counts a mark would be in the way of what templates do with a message.
        mark = self._unused_marks(messages)[1]
        marked, systems = list[Mapping[str, str]](), 0
        for message in messages:
            if message["role"] == "system" and (text := message["content"].rstrip()):
                message = {**message, "content": text + mark + message["content"][len(text) :]}
                systems += 1
            marked.append(message)
        try:
            rendered, *shown = chat.render_each(template, [messages, marked] if systems else [messages], variables)
        except chat.TemplateError as error:
            raise TokenizerError(
                str(error), "Leave out --system if the model knows no such role, or give another template."
            ) from error
        if any(text.count(mark) < systems for text in shown):
            raise TokenizerError(
                "the chat template drops the system message",
                "Leave out --system, and put its text into the prompt.",
            )
        return rendered

    @property
    def _template(self) -> str:
        if self.chat_template is None:
            raise TokenizerError(
                "the model has no chat template",
                "Give a tokenizer that has one (--tokenizer DIR), or continue a text: generate without --chat.",
            )
        return self.chat_template

    def _unused_marks(self, messages: Messages) -> list[str]:
        used = {character for message in messages for value in message.values() for character in value}
        used |= {character for token in self.vocabulary.control for character in token}
        marks = [mark for mark in _MARKS if mark not in used]
        if len(marks) < 2:
            raise TokenizerError(
                "the messages use nearly all of U+FDD0 to U+FDEF",
                "Remove two of them: Unicode assigns them to no character.",
            )
        return marks


class TextStream:
    """Decoder for tokens that arrive one at a time: it returns a character once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this token completes; "" while a character is incomplete."""
        return self._decoder.decode(self._tokenizer._piece(token))

    def end(self) -> str:
        """Return the rest of the text: U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)
