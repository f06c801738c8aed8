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
from q6k_kernels.models.fusing import Part
from q6k_kernels.weights.byte_layers import ByteLinear
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


def _refuse_joined(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        "a projection is joined with its neighbours, and an adapter wants it by its name",
        "Load the model with `quantization_config=PlanarConfig(joined=False)`.",
    )


def _refuse_bytes(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        "layers of a byte for each weight have no gradients",
        'Load the model with `quantization_config=PlanarConfig(weights="packed")`.',
    )


def on_packed_layers(config: LoraConfig) -> LoraConfig:
    """Let a configuration of LoRA apply to packed layers, and return it.

    Raises:
        UnsupportedModelError: the layers are "all-linear", among which PEFT looks for torch's alone.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        raise UnsupportedModelError(
            'target_modules: "all-linear" finds torch.nn.Linear, and no packed layers',
            'Name them: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"].',
        )
    layers = {PackedLinear: PackedLora, Part: _refuse_joined, ByteLinear: _refuse_bytes}
    config._register_custom_module(layers)
    return config
