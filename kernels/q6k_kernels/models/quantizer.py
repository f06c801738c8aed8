"""The quantiser of transformers that reads bundles: it is registered when this module is imported.

    model = AutoModelForCausalLM.from_pretrained("out/", device_map="auto", dtype=torch.bfloat16)

transformers builds the model on the meta device; `pretrained.Loading` fills it where transformers would load
weights, as `load_model` does. Nothing of torch is imported here, as this module is imported whenever transformers'
own quantisers are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from q6k_kernels.bundle.manifest import FORMAT
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.asked_quantizer import guard

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from q6k_kernels.formats.checks import Activations
    from q6k_kernels.models.cpu_form import Weights
    from q6k_kernels.models.pretrained import Loading


@register_quantization_config(FORMAT)
class PlanarConfig(QuantizationConfigMixin):
    """What `config.json` says under `quantization_config`, or a caller of `from_pretrained`.

    Args:
        activations: "auto", "int8" or "bf16", see `q6k_kernels.linear`.
        weights: form of weights on a CPU, "packed", "bytes" or "auto", see `cpu_form`.
        joined: whether projections that share their input run as one, see `fusing`; adapters want each by its name.
        quant_method: name of the format.
        unknown: what else is said.

    Raises:
        UnsupportedModelError: a field is unknown, or `joined` is neither true nor false.
    """

    def __init__(
        self,
        activations: Activations = "auto",
        weights: Weights = "packed",
        joined: bool = True,
        quant_method: str = FORMAT,
        **unknown: object,
    ) -> None:
        if unknown or not isinstance(joined, bool):
            wrong = f"fields {', '.join(unknown)} that are unknown" if unknown else f"{joined!r} for joined, a bool"
            raise UnsupportedModelError(
                f"quantization_config: found {wrong}",
                "Correct what from_pretrained or PlanarConfig is given. If config.json says it, move that away and "
                "write it again: `q6k-convert hf OUT/`.",
            )
        self.quant_method: Any = quant_method  # transformers has a closed set of names, and takes others
        self.activations, self.weights, self.joined = activations, weights, joined


@register_quantizer(FORMAT)
class PlanarQuantizer(HfQuantizer):
    """The way of a bundle through `from_pretrained`."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._loading: Loading | None = None
        self._device_map: dict[str, Any] = {}
        if not self.pre_quantized:
            raise UnsupportedModelError(
                f"{FORMAT} is the format of bundles, and no model in another format can be loaded into it",
                "Convert a GGUF file of the model: `q6k-convert`.",
            )

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Note the devices; transformers calls it before the model is built, and again once it has chosen them."""
        self._device_map = {"": "cpu"} if device_map is None else device_map
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedModelError(
                "device_map: packed weights cannot be offloaded to disk",
                "Leave out the disk: let some be on the CPU.",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Let a model have the dtype that its `config.json` states where the caller says None.

        transformers would take that of the first array in the files, which here is a part of a weight.
        """
        if config.dtype is None:
            name, dtype = config.name_or_path, "bfloat16"  # what `hf` writes
            if name:
                dtype = type(config).get_config_dict(name, local_files_only=True)[0].get("dtype") or dtype
            config.dtype = dtype
        return config

    update_tp_plan = update_attn_implementation
    """The same, where transformers 5.17 asks."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Check the dtype of activations and unpacked weights."""
        from q6k_kernels.formats.checks import check_dtype

        check_dtype(dtype)
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        from q6k_kernels.models.pretrained import Loading

        config = cast("PlanarConfig", self.quantization_config)
        self._loading = Loading(
            model, options["checkpoint_files"], config.activations, config.weights, joined=config.joined
        )

    def param_element_size(self, _: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes that each number of a parameter takes in the filled model."""
        return self._under_way.element_size(param_name, param)

    def update_weight_conversions(self, *_: Any) -> list[Any]:
        """Return the one conversion that loads the whole model, in place of those of the model's class."""
        from q6k_kernels.models.pretrained import conversion

        return [conversion(self._under_way)]

    def fill(self, model: PreTrainedModel) -> None:
        """Load all weights to their devices."""
        self._under_way.fill(model, self._device_map)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self._under_way.finish(model)
        self._loading = None
        return model

    @property
    def _under_way(self) -> Loading:
        return cast("Loading", self._loading)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> NoReturn:
        raise UnsupportedModelError(
            f"a {type(model).__name__} of packed weights does not become one of {dtype or 'other weights'}",
            "transformers dequantises the GGUF file itself: `from_pretrained(..., gguf_file=FILE)`.",
        )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Say that a model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained; packed weights stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch compiles the model."""
        return True


guard(auto, PlanarConfig)
