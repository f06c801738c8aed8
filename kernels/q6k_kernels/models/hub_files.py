"""The files that transformers wants beside a bundle's own, made of the bundle's metadata and manifest alone.

They say nothing that these do not say, so that a bundle is still one truth. The same bundle gives the same bytes
with the same release of the package `tokenizers`, whose form `tokenizer.json` has.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from q6k_kernels.bundle.manifest import FORMAT, Manifest
from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.models.architecture import described
from q6k_kernels.models.cpu_form import Weights
from q6k_kernels.models.hyperparameters import Shapes
from q6k_kernels.models.registry import architecture_of
from q6k_kernels.models.sizes import suppressed_tokens
from q6k_kernels.tokenizer.hugging_face import tokenizer_files

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def hub_files(metadata: Metadata, manifest: Manifest, weights: Weights = "packed") -> dict[str, bytes]:
    """Return the content of each file by its name; `config.json`, without which nothing opens, is the last.

    Args:
        metadata: metadata of the bundle.
        manifest: its manifest.
        weights: form of weights on a CPU, see `cpu_form`.

    Raises:
        UnsupportedModelError, HyperparameterError: no model can be made from the bundle.
        TokenizerError: no `tokenizer.json` can be made from its vocabulary.
        BundleError: a key has the wrong type.
    """
    shapes = {tensor.name: tuple(tensor.shape) for tensor in manifest.tensors}
    kind, values = described(architecture_of(metadata), metadata, shapes)
    vocabulary, files = tokenizer_files(metadata)
    files[GENERATION] = _generation(metadata, values, sorted(vocabulary.stop))
    files[CARD] = _card(metadata, manifest, kind)
    files[CONFIG] = config(metadata, shapes, weights)
    return {
        name: content.encode() if isinstance(content, str) else _as_json(content) for name, content in files.items()
    }


def config(metadata: Metadata, shapes: Shapes, weights: Weights = "packed") -> dict[str, Any]:
    """Return the content of `config.json`: the fields of transformers' configuration, and how weights are stored.

    Raises:
        UnsupportedModelError, HyperparameterError, BundleError: as by `load_model`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, values = described(architecture_of(metadata), metadata, shapes)
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        "dtype": "bfloat16",
        "model_type": kind,
        "quantization_config": {"activations": "auto", "quant_method": FORMAT, "weights": weights},
        **values,
    }


def _generation(metadata: Metadata, values: dict[str, Any], stop: list[int]) -> dict[str, Any]:
    named = {name: values.get(name) for name in ("bos_token_id", "pad_token_id")}
    content: dict[str, Any] = {name: token for name, token in named.items() if token is not None}  # 0 is a token
    if stop:
        content["eos_token_id"] = stop
    if suppressed := suppressed_tokens(metadata, values["vocab_size"]):
        content["suppress_tokens"] = suppressed
    return content


def _card(metadata: Metadata, manifest: Manifest, kind: str) -> str:
    """Return the model card."""
    title = _line(metadata.string("general.name") or "") or manifest.architecture
    stated = (metadata.string("general.license") or "").lower()
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [FORMAT, kind],
        **({"license": stated} if _LICENSE.fullmatch(stated) else {}),
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in sorted(head.items()))
    types = Counter[str]()
    for tensor in manifest.tensors:
        types[tensor.type] += tensor.nbytes
    rows = "\n".join(f"| {name} | {nbytes:,} |" for name, nbytes in types.most_common())
    sources = "\n".join(f"- `{_line(source.name)}`, {source.size:,} bytes" for source in manifest.sources)
    return f"""---
{front}
---

# {title}

A bundle of the format {FORMAT}: the weights of a GGUF file, packed as they are there, for PyTorch.

    pip install 'q6k-convert[inference]' accelerate

```python
import q6k_kernels
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

Made from:

{sources}

| type of weights | bytes in the bundle |
|---|---|
{rows}
"""


def _line(text: str) -> str:
    """Return a text of the file as plain text of one line."""
    return re.sub(r"[^\w .:,+()/-]", "", " ".join(text.split()))[:200]


def _as_json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
