"""LoRA of PEFT on packed layers, which PEFT does not know.

    config = on_packed_layers(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

The model is one whose projections have the names that they have in transformers: `quantization_config` of its
configuration has `"joined": False`. So the adapter also fits the model that the GGUF file was made from.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.weights.layers import PackedLinear


class PackedLora(Linear):  # type: ignore[misc]
    """A LoRA beside a packed layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # this class supports it
            super().__init__(*arguments, **options)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: packed weights cannot take the adapter's."""
        raise UnsupportedModelError(
            "an adapter cannot be merged into packed weights",
            "Keep it beside them, or merge it into the model that the GGUF file was made from.",
        )


def on_packed_layers(config: LoraConfig) -> LoraConfig:
    """Let a configuration of LoRA apply to packed layers, and return it."""
    config._register_custom_module({PackedLinear: PackedLora})
    return config
