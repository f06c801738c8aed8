"""A bundle's vocabulary as the files of Hugging Face's tokenizers: `tokenizer.json`, `tokenizer_config.json`.

They give the ids that `Tokenizer.encode` gives, but for texts of control tokens in a text, which Hugging Face's
tokenizers read as these tokens.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.tokenizer import chat
from q6k_kernels.tokenizer.pieces import SPACE
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from q6k_kernels.tokenizer.vocabulary import Vocabulary, read_vocabulary

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NAMED = ("bos", "eos", "unk", "pad")


def tokenizer_files(metadata: Metadata) -> tuple[Vocabulary, dict[str, Any]]:
    """Return the vocabulary of a bundle, and the content of each file by name: JSON, or a text.

    Raises:
        TokenizerError: as by `load_tokenizer`, or the vocabulary merges texts that are no tokens, or the chat
            template is none of Jinja.
        PackageMissingError: there is a chat template, and Jinja is missing or too old.
        BundleError: a key has the wrong type.
    """
    try:
        vocabulary = read_vocabulary(metadata)
    except TokenizerError as error:
        command = f"q6k-convert generate {shlex.quote(str(metadata.path.parent))} --tokenizer DIR"
        raise TokenizerError(error.cause, f"Run the model with a tokenizer from elsewhere: {command}") from error
    files: dict[str, Any] = {
        TOKENIZER: _tokenizer(metadata, vocabulary),
        TOKENIZER_CONFIG: _config(metadata, vocabulary),
    }
    if (template := metadata.string("tokenizer.chat_template")) is not None:
        try:
            chat.check_syntax(template)
        except chat.TemplateError as error:
            raise TokenizerError(
                f"{metadata.path}: tokenizer.chat_template: {error}",
                "Give the GGUF file another (`gguf-new-metadata --chat-template-file FILE OLD NEW`); convert that.",
            ) from error
        files[TEMPLATE] = _with_bos(template, vocabulary)
    return vocabulary, files


def _with_bos(template: str, vocabulary: Vocabulary) -> str:
    """Return a chat template that writes BOS if every text begins with it, as `Tokenizer.encode_chat` does."""
    if not vocabulary.add_bos or "bos_token" in template or _text(vocabulary, "bos") in template:
        return template
    return "{{ bos_token }}" + template


def _tokenizer(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    if vocabulary.spelled:
        raise TokenizerError(
            f"{metadata.path}: tokenizer.ggml.merges: {len(vocabulary.spelled)} of the texts that they join are no "
            f"tokens, which {TOKENIZER} cannot say",
            "Take the tokenizer of the model that the GGUF file was made from.",
        )
    content: dict[str, Any] = json.loads(vocabulary.backend.to_str())
    content["model"]["vocab"] |= vocabulary.control
    added = {token["id"]: token for token in content["added_tokens"]}
    for text, token in vocabulary.control.items():
        added[token] = {
            "id": token,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": token in vocabulary.swallowing,
            "normalized": False,
            "special": True,
        }
    content["added_tokens"] = [added[token] for token in sorted(added)]
    content["decoder"] = _decoder(content)
    if vocabulary.add_bos:
        content["post_processor"] = _begins_with(_text(vocabulary, "bos"), vocabulary.names["bos"])
    return content


def _decoder(content: dict[str, Any]) -> dict[str, Any]:
    """Return the inverse of a tokenizer's normalizer and first split."""
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    if any(step["type"] == "ByteLevel" for step in steps):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if any(each["type"] == "Prepend" for each in content["normalizer"].get("normalizers", [])):
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _begins_with(text: str, token: int) -> dict[str, Any]:
    """Return the step that puts a token before every text."""
    begin = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": at}} for at, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": text, "type_id": 1}}, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _config(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    named = {f"{name}_token": _text(vocabulary, name) for name in _NAMED if name in vocabulary.names}
    content = {
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # answers to several prompts continue their ends
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    if metadata.context_length is not None:
        content["model_max_length"] = metadata.context_length
    return content


def _text(vocabulary: Vocabulary, name: str) -> str:
    """Return the text of a special token, given by its name."""
    token = vocabulary.names[name]
    texts = (text for text, i in vocabulary.control.items() if i == token)
    return next(texts, None) or str(vocabulary.backend.id_to_token(token))
