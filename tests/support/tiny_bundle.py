"""A bundle with a tiny vocabulary, and a random llama in the place of the model that would be made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gguf_builder import small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from tokenizer_files import TEMPLATE, sentencepiece, sentencepiece_ids, write


@dataclass
class TinyBundle:
    """The bundle, the model, and what `load_model` was asked for."""

    path: Path
    model: Any
    asked: dict[str, Any] = field(default_factory=dict)

    def write(self, **keys: Any) -> None:
        """Write other keys, `general__` and `ggml__` for `general.` and `ggml.`; None removes one."""
        changed = {name.replace("__", "."): value for name, value in keys.items()}
        both = tiny_keys() | changed
        write(self.path, {name: value for name, value in both.items() if value is not None})

    def best(self, ids: list[int], count: int) -> list[int]:
        """Return the likeliest tokens, as transformers generates them."""
        import torch

        with torch.no_grad():
            out = self.model.float().generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        found: list[int] = out[0, len(ids) :].tolist()
        return found


def tiny_keys() -> dict[str, Any]:
    """Return the keys of the bundle."""
    return sentencepiece() | {"chat_template": TEMPLATE, "llama.context_length": 300}


def ids_of(text: str) -> list[int]:
    """Return the tokens of a text behind BOS."""
    return [1, *sentencepiece_ids(sentencepiece(), text)]


def tiny_bundle(directory: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    """Make the bundle in `directory/out`, whose model `load_model` returns from now on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import q6k_kernels

    source, keys = small_model(), tiny_keys()
    source.tensors[0] = weight("token_embd.weight", (len(keys["ggml.tokens"]), 512))
    convert(source.write(directory / "model.gguf"), directory / "out", Options())
    write(directory / "out", keys)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(keys["ggml.tokens"]), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    found = TinyBundle(directory / "out", LlamaForCausalLM(config).eval())

    def load_model(path: Path, **more: Any) -> Any:
        found.asked.update(more, path=path)
        more["progress"](1)
        return found.model.to(more["dtype"])

    monkeypatch.setattr(q6k_kernels, "load_model", load_model)
    return found
