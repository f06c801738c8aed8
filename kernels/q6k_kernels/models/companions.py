"""The files that transformers wants beside a bundle's own, made of the bundle's metadata.

They hold nothing that `metadata.gguf` does not say, so the same bundle gives the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

from q6k_kernels.bundle.manifest import FORMAT
from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.models.architecture import described
from q6k_kernels.models.hyperparameters import Shapes
from q6k_kernels.models.registry import architecture_of

CONFIG = "config.json"


def config_json(metadata: Metadata, shapes: Shapes) -> bytes:
    """Return `config.json`: the fields of transformers' configuration, and how weights are stored.

    Raises:
        UnsupportedModelError, HyperparameterError, BundleError: as by `load_model`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, values = described(architecture_of(metadata), metadata, shapes)
    content = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        "dtype": "bfloat16",
        "model_type": kind,
        "quantization_config": {"activations": "auto", "quant_method": FORMAT},
        **values,
    }
    return as_json(content)


def as_json(content: dict[str, Any]) -> bytes:
    """Return a JSON text in one form."""
    return json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True).encode() + b"\n"
