"""The loading of one model by transformers' `from_pretrained`, up to what `load_model` returns.

transformers gives it the model on the meta device, of the configuration in `config.json`, and a place in its own
loading: a conversion of one tensor, in which the whole model is filled. Then transformers finds that nothing is
missing, attaches its hooks for several devices, and hands the model on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.bundle.published import completed
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.formats.checks import Activations, check_activations
from q6k_kernels.formats.tiles import tiles_shape
from q6k_kernels.formats.types import weight_type
from q6k_kernels.models.architecture import described, gguf_names, make_config
from q6k_kernels.models.counting import attach_counter
from q6k_kernels.models.cpu_form import Weights, choose, to_bytes
from q6k_kernels.models.filling import Filler
from q6k_kernels.models.matching import HEAD, own_parameters
from q6k_kernels.models.mixtures import stored_parts
from q6k_kernels.models.ranks import Share
from q6k_kernels.models.registry import architecture_of
from q6k_kernels.models.resizing import attach_resizer
from q6k_kernels.models.saving import attach_saver
from q6k_kernels.models.skeleton import check_device, check_transformers, fit, matched, shapes_of
from q6k_kernels.models.splitting import Splitter, in_all_layers, leave_to_us, ranks_of
from q6k_kernels.models.stored import Stored
from q6k_kernels.weights.reader import open_bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIED = {f"{HEAD}.tiles": "model.embed_tokens.tiles"}


class Loading:
    """The loading of one model.

    Args:
        model: a model on the meta device; it becomes that which the bundle fills.
        files: the bundle's shards.
        activations: mode of the packed layers.
        weights: form of weights on a CPU, see `cpu_form`.
        joined: whether projections that share their input run as one.

    Raises:
        UnsupportedModelError: `config.json` is not of this bundle, or as by `load_model`.
        WeightsError, HyperparameterError, BundleError, OSError: as by `load_model`.
    """

    def __init__(
        self, model: PreTrainedModel, files: list[str], activations: Activations, weights: Weights, *, joined: bool
    ) -> None:
        check_transformers()
        check_activations(activations)
        self.activations, self.weights, self.joined = activations, weights, joined
        self.bundle = open_bundle(completed(Path(files[0]).parent))
        metadata = read_metadata(self.bundle.path)
        self.architecture, shapes = architecture_of(metadata), shapes_of(self.bundle)
        kind, values = described(self.architecture, metadata, shapes)
        _check_class(model, kind)
        _check_config(model.config, make_config(self.architecture, metadata, shapes), kind, values)
        matched(self.bundle, metadata, self.architecture, model.dtype)
        fit(model, self.architecture, shapes)
        if self.architecture.softcap_of_scores(model.config) and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")  # SDPA has no soft cap
        self.names = gguf_names(self.architecture, list(own_parameters(model)), model.config.num_hidden_layers)
        self._buffers = dict[str, Tensor]()
        self._plan = dict[str, str]()
        self._parts = self._divide(model)

    def _divide(self, model: PreTrainedModel) -> dict[str, Share]:
        """Return the part of each layer that this rank has, and keep transformers from dividing the model."""
        ranks = ranks_of(model)
        if ranks is None:
            return {}
        self._plan = dict(model.tp_plan or {})
        leave_to_us(model)
        return Splitter(model, ranks, self._plan, self._block, self._stored).parts()

    def _block(self, module: str) -> int:
        format = self.bundle.info(self.names[f"{module}.weight"]).format
        return weight_type(format).block if format else 1

    def _stored(self, module: str) -> Stored:
        return self.architecture.difference(self.names[f"{module}.weight"])

    def element_size(self, parameter: str, values: Tensor) -> float:
        """Return the bytes that each number of a parameter takes once it is loaded."""
        if (name := self.names.get(parameter)) is None:
            return values.element_size()
        stored = [self.bundle.info(part) for part in stored_parts(name, self.bundle)]
        if any(each.format is None for each in stored):
            return values.element_size()
        shapes = (tiles_shape(tuple(each.shape), weight_type(str(each.format))) for each in stored)
        whole = sum(math.prod(map(int, shape)) for shape in shapes) / values.numel()
        part = self._parts.get(parameter.rpartition(".")[0])
        shape = tuple(values.shape)
        return whole if part is None else whole * math.prod(part.shape(shape)) / math.prod(shape)

    def smallest(self) -> tuple[str, str]:
        """Return a parameter and the key of its one array, the smallest of them."""
        plain = {
            parameter: self.bundle.info(name)
            for parameter, name in self.names.items()
            if name in self.bundle and self.bundle.info(name).storage == "plain"
        }
        parameter = min(plain, key=lambda each: plain[each].nbytes)
        return parameter, plain[parameter].arrays["data"].key

    def fill(self, model: PreTrainedModel, device_map: dict[str, Any]) -> None:
        """Load all weights, each to the device of its module."""

        def device_of(module: str) -> torch.device:
            while module not in device_map and module:
                module = module.rpartition(".")[0]
            return torch.device(device_map.get(module, "cpu"))

        devices = {torch.device(each) for each in device_map.values()}
        for device in devices:
            check_device(device, model.dtype)
        kind = max(device.type for device in devices)  # "cuda" if there is one
        form, _ = choose(self.weights, self.bundle.manifest.tensors, kind, self.activations)
        Filler(
            model,
            self.bundle,
            self.architecture,
            device_of,
            model.dtype,
            self.activations,
            lambda _: None,
            self._parts,
            joined=self.joined,
        ).fill()
        if form == "bytes":
            to_bytes(model)
        # What follows initialises buffers that no file has, and everything that it does not know to be loaded.
        for module in model.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        self._buffers = dict(model.named_buffers())
        tied = _TIED if model.config.tie_word_embeddings and hasattr(model.get_submodule(HEAD), "tiles") else {}
        if self._parts:
            tied = {}  # one parameter already, under names that depend on the number of ranks
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            kept = not self._parts and isinstance(model.get_input_embeddings(), nn.Embedding)
            kept = kept and name == "_tied_weights_keys"
            setattr(model, name, model._tied_weights_keys if kept else dict(tied))

    def finish(self, model: PreTrainedModel) -> None:
        """Give buffers their values again, and make the model what `load_model` returns."""
        for name, values in self._buffers.items():
            module, _, kind = name.rpartition(".")
            owner = model.get_submodule(module)
            setattr(owner, kind, values.to(getattr(owner, kind).device))
        model.requires_grad_(False)
        if self._plan:
            divided = {in_all_layers(name) for name in self._parts}
            model._tp_plan = {name: style for name, style in self._plan.items() if name in divided}
        attach_saver(model, self.bundle.path)
        attach_resizer(model)
        attach_counter(model)


def _check_class(model: PreTrainedModel, kind: str) -> None:
    """Check that a model is transformers' of its kind for causal language modelling."""
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    if wanted not in (each.__name__ for each in type(model).__mro__):
        raise UnsupportedModelError(
            f"the bundle holds a {wanted}, and a {type(model).__name__} has other weights",
            "Load it with AutoModelForCausalLM; its `model` is the model without a head.",
        )


def _check_config(config: Any, expected: Any, kind: str, values: dict[str, Any]) -> None:
    """Check that a configuration is that of the bundle, but for the ids of special tokens."""
    own, bundles = config.to_dict(), expected.to_dict()
    for field in ("model_type", *(name for name in values if not name.endswith("_token_id"))):
        found, wanted = (json.dumps(each.get(field), sort_keys=True) for each in (own, bundles))
        if found != wanted:
            raise UnsupportedModelError(
                f"config.json, or an argument of from_pretrained: {field}: the bundle's {kind} has {wanted}, found "
                f"{found[:200]}",
                "Let `q6k-convert hf` write config.json again.",
            )


class _Whole(ConversionOps):
    """An operation on a tensor that changes nothing: `_Filling` has to name one."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Return the tensors."""
        return input_dict


class _Filling(WeightConverter):
    """The conversion of one tensor, in which the whole model is filled."""

    def convert(
        self,
        layer_name: str,  # noqa: ARG002 -- transformers names it
        model: Any = None,
        config: Any = None,  # noqa: ARG002 -- likewise
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        """Fill the model; all names and shapes have been compared with the bundle's before."""
        self.materialize_tensors()
        hf_quantizer.fill(model)
        loading_info.missing_keys.clear()
        loading_info.unexpected_keys.clear()
        return {}


def conversion(loading: Loading) -> WeightConverter:
    """Return the conversion that fills a model."""
    parameter, key = loading.smallest()
    return _Filling([f"^{key.replace('.', '[.]')}$"], [parameter], [_Whole()])
