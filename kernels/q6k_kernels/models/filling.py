"""Filling a transformers model on the meta device with a bundle's weights, one tensor at a time.

Names and shapes have been checked before (see `matching`). At the end every tensor of the model must have been read
once, and every parameter filled. At most one tensor exists twice in memory at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from q6k_kernels.cuda import device as launching
from q6k_kernels.errors import WeightsError
from q6k_kernels.formats.checks import Activations
from q6k_kernels.formats.tiles import order_rows
from q6k_kernels.models import fusing, mixtures, ranks
from q6k_kernels.models.architecture import FREQUENCY_FACTORS, Architecture, gguf_names
from q6k_kernels.models.counting import WIDE
from q6k_kernels.models.matching import EXPORT_AGAIN, HEAD, divides, has_factors, own_parameters, rotary_factors
from q6k_kernels.models.rotary import HeadRotary
from q6k_kernels.weights.casting import keep_dtype
from q6k_kernels.weights.layers import PackedEmbedding, PackedLinear, ScaledEmbedding
from q6k_kernels.weights.reader import Bundle, Loader
from q6k_kernels.weights.transfer import Piece
from q6k_kernels.weights.weight import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Filler:
    """The filling of one model.

    Args:
        model: a model on the meta device.
        bundle: the source of its weights.
        architecture: how the bundle's tensors differ from the model's parameters.
        devices: returns the device of a module, given its name.
        dtype: dtype of weights that are not packed.
        activations: mode of the packed linear layers.
        progress: called with the stored bytes of each tensor once it is loaded.
        parts: the part of each layer to load, by its name, of those that are divided among ranks.
        joined: whether projections that share their input run as one, see `fusing`.

    Raises:
        UnsupportedModelError: a parameter has no GGUF name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bundle: Bundle,
        architecture: Architecture,
        devices: Callable[[str], torch.device],
        dtype: torch.dtype,
        activations: Activations,
        progress: Callable[[int], None],
        parts: Mapping[str, ranks.Share] | None = None,
        *,
        joined: bool = True,
    ) -> None:
        self.model, self.bundle, self.architecture = model, bundle, architecture
        self.devices, self.dtype, self.activations = devices, dtype, activations
        self.progress = progress
        self._loaders = dict[torch.device, Loader]()
        self._go_to("")
        self.config: Any = model.config
        self.is_tied: bool = self.config.tie_word_embeddings
        self.parts, self.joined = parts or {}, joined
        self.shapes = ranks.shapes_of_parts(model, self.parts, own_parameters(model))
        self.names = gguf_names(architecture, list(self.shapes), self.config.num_hidden_layers)
        self.unread = {part for name in self.names.values() for part in mixtures.stored_parts(name, bundle)}
        if has_factors(bundle, architecture):
            self.unread.add(FREQUENCY_FACTORS)
        self.unread |= set(rotary_factors(bundle, architecture, model))

    def _go_to(self, module: str) -> None:
        """Let what follows be loaded to the device of a module."""
        self.device = self.devices(module)
        if self.device not in self._loaders:
            self._loaders[self.device] = self.bundle.loader(self.device)
        self.load = self._loaders[self.device]

    def fill(self) -> None:
        """Load all weights, and compute the rotary frequencies, which no file has.

        Raises:
            WeightsError: a tensor has a type or values that its parameter cannot take.
            BundleError: a file has changed since the bundle was opened.
            OSError: a file cannot be read.
        """
        modules = dict(self.model.named_modules())
        for name, module, group in list(fusing.groups(self.model)) if self.joined else ():
            self._go_to(name)
            if self._fuse(name, module, group):
                for part in group.parts:
                    del modules[f"{name}.{part}"]
        for name, module in modules.items():
            self._go_to(name)
            if isinstance(module, nn.Embedding):
                self._embedding(name, module)
            elif isinstance(module, nn.Linear) and not (self.is_tied and name == HEAD):
                self._linear(name, module)
            elif isinstance(module, mixtures.ClampedExperts):
                self._clamped_experts(name, module)
            elif mixtures.is_mixture(module):
                self._experts(name, module)
            elif name != HEAD:
                self._parameters(name, module)
        if self.is_tied:
            self._tie()
        self._rotary()
        self._check_filled()
        ranks.connect(self.model, self.parts)

    def _fuse(self, name: str, module: nn.Module, group: fusing.Group) -> bool:
        parts = [f"{name}.{part}" for part in group.parts]
        rows = [self.shapes[f"{part}.weight"][0] for part in parts]
        biases = [f"{part}.bias" for part in parts]
        biased = any(bias in self.names for bias in biases)
        formats = [self._format(f"{part}.weight") for part in parts]
        if (None in formats and not group.mixed) or any(self._gathered(part) for part in parts):
            return False
        stacks = fusing.stacks(rows, formats)
        if len(stacks) == len(parts):
            return False  # nothing would be saved
        k = self.shapes[f"{parts[0]}.weight"][1]
        weights = [self._stack(parts[stack], rows[stack], k, formats[stack.start]) for stack in stacks]
        each = [self._bias(*pair) for pair in zip(biases, rows, strict=True)] if biased else []
        joined = [torch.cat(each[stack]) if biased else None for stack in stacks]
        fusing.fuse(module, group, rows, weights, joined, self.activations)
        if group is fusing.GATE_UP and self.architecture.activation == "silu":
            # The gate's columns of the product are used once: 59 MB less for 2048 tokens of an 8B model.
            module.act_fn = fusing.SiluInPlace()
        return True

    def _gathered(self, module: str) -> bool:
        return module in self.parts and self.parts[module].way == "gathered rows"

    def _bias(self, parameter: str, rows: int) -> Tensor:
        """Return a bias; zeros if the layer has none and its neighbours have."""
        if parameter in self.names:
            return self._plain(parameter)
        return torch.zeros(rows, dtype=self.dtype, device=self.device)

    def _stack(self, parts: list[str], rows: list[int], k: int, format: str | None) -> PackedWeight | Tensor:
        if format is None:
            return torch.cat([self._plain(f"{part}.weight") for part in parts])
        if len(parts) == 1:
            return self._packed(f"{parts[0]}.weight")
        return fusing.join(rows, k, format, lambda index: self._packed(f"{parts[index]}.weight"), self.device)

    def _linear(self, name: str, module: nn.Linear) -> None:
        if self._format(f"{name}.weight") is None:
            self._parameters(name, module)
            return
        bias = None if module.bias is None else self._plain(f"{name}.bias")
        weight = self._packed(f"{name}.weight")
        linear = PackedLinear.from_weight(weight, bias, self.activations)
        inputs = self._inputs(f"{name}.weight", weight.k)
        self.model.set_submodule(name, linear if inputs is None else fusing.ReorderedInput(linear, inputs))

    def _inputs(self, parameter: str, columns: int) -> Tensor | None:
        """Return transformers' input for each input that the file has; None if their order is the same."""
        order = self.architecture.difference(self.names[parameter]).inputs
        inputs = None if order is None else order(self.config, columns)
        return None if inputs is None else inputs.to(self.device)

    def _experts(self, name: str, module: nn.Module) -> None:
        gate_up, down = (self.names[f"{name}.{part}"] for part in (mixtures.GATE_UP, mixtures.DOWN))
        parts = mixtures.stored_parts(gate_up, self.bundle)
        own = (self.architecture.activation, self.activations, self.dtype)
        load = partial(self._load, piece=self._experts_here(name))
        self.model.set_submodule(name, mixtures.filled(module, load, parts, down, *own))

    def _experts_here(self, name: str) -> Piece | None:
        return self.parts[name].piece(0) if name in self.parts else None

    def _clamped_experts(self, name: str, module: mixtures.ClampedExperts) -> None:
        stacks, biases = (
            [
                part
                for each in (mixtures.GATE_UP, mixtures.DOWN)
                for part in mixtures.stored_parts(self.names[f"{name}.{each}{kind}"], self.bundle)
            ]
            for kind in ("", "_bias")
        )
        here = self._experts_here(name)
        filled = mixtures.filled_clamped(
            module,
            [self._load(each, here) for each in stacks],
            [self._floats(each, here).to(self.dtype) for each in biases],
            self.activations,
            self.dtype,
        )
        self.model.set_submodule(name, filled)

    def _embedding(self, name: str, module: nn.Embedding) -> None:
        scale = float(cast("Any", module).scalar_embed_scale) if self.architecture.scaled_embedding else None
        if self._format(f"{name}.weight") is None:
            self._parameters(name, module)
            if scale is not None:
                module.embed_scale = torch.tensor(scale, device=self.device)
                keep_dtype(module, "embed_scale")
            return
        weight = self._packed(f"{name}.weight")
        if scale is None:
            self.model.set_submodule(name, PackedEmbedding.from_weight(weight, self.dtype))
        else:
            self.model.set_submodule(name, ScaledEmbedding.from_scaled(weight, self.dtype, scale))

    def _tie(self) -> None:
        embedding: Any = self.model.get_input_embeddings()
        device = self.devices(HEAD)
        if isinstance(embedding, PackedEmbedding):
            weight = embedding.weight.to(device)  # the same weight on the same device
            self.model.set_submodule(HEAD, PackedLinear.from_weight(weight, None, self.activations))
        else:
            weight = embedding.weight
            shared = weight if weight.device == device else nn.Parameter(weight.to(device), requires_grad=False)
            self.model.get_submodule(HEAD).weight = shared

    def _parameters(self, name: str, module: nn.Module) -> None:
        buffers, wide = [kind for kind, _ in module.named_buffers(recurse=False)], list[str]()
        for kind, _ in list(module.named_parameters(recurse=False)):
            parameter = f"{name}.{kind}"
            values = self._plain(parameter)
            if self.architecture.difference(self.names[parameter]).wide:
                # As a parameter it could pass for one of the model's dtype, which is that of its first.
                delattr(module, kind)
                module.register_buffer(kind, values)
                wide.append(kind)
            else:
                setattr(module, kind, nn.Parameter(values, requires_grad=False))
        for kind in buffers:
            if f"{name}.{kind}" in self.names:
                setattr(module, kind, self._plain(f"{name}.{kind}"))
        if wide:
            keep_dtype(module, *wide)
            module.__dict__[WIDE] = tuple(wide)

    def _format(self, parameter: str) -> str | None:
        """Return the name of a weight's type; None if it is not packed."""
        return self.bundle.info(self.names[parameter]).format

    def _piece(self, parameter: str) -> Piece | None:
        """Return the piece of a parameter to load; None for all of it."""
        module, _, kind = parameter.rpartition(".")
        part = self.parts.get(module)
        if part is None or (part.of_columns and kind == "bias"):
            return None
        return part.piece(self.bundle.info(self.names[parameter]).shape[0])

    def _load(self, name: str, piece: Piece | None = None) -> PackedWeight | Tensor:
        self.unread.remove(name)
        tensor = self.load(name, piece=piece)
        self.progress(self.bundle.info(name).nbytes)
        return tensor

    def _packed(self, parameter: str) -> PackedWeight:
        name = self.names[parameter]
        weight = cast("PackedWeight", self._load(name, self._piece(parameter)))
        order = self.architecture.difference(name).rows
        if order is not None and (rows := order(self.config, weight.n)) is not None:
            order_rows(weight.tiles, rows.to(weight.device), weight.row)
            if weight.tiles.is_cuda:
                launching.end_write(weight.tiles)
        return weight

    def _plain(self, parameter: str) -> Tensor:
        name = self.names[parameter]
        tensor = self._floats(name, self._piece(parameter))
        stored = self.architecture.difference(name)
        if stored.values is not None:
            tensor = stored.values(tensor.float())
        if stored.inputs is not None and (inputs := self._inputs(parameter, tensor.shape[-1])) is not None:
            tensor = tensor[:, inputs.argsort()]
        if stored.rows is not None and (rows := stored.rows(self.config, len(tensor))) is not None:
            tensor = tensor[rows.to(tensor.device)]
        return tensor.to(torch.float32 if stored.wide else self.dtype).view(self.shapes[parameter])

    def _floats(self, name: str, piece: Piece | None = None) -> Tensor:
        tensor = self._load(name, piece)
        if isinstance(tensor, PackedWeight) or not tensor.is_floating_point():
            raise WeightsError(
                f"{self.bundle.path}: {name}: expected floating-point numbers, found {self.bundle.info(name).type}",
                EXPORT_AGAIN,
            )
        return tensor

    def _rotary(self) -> None:
        """Compute the rotary frequencies: on the CPU in fp32, so that all devices have the same ones."""
        factors = self._divisors(FREQUENCY_FACTORS) if FREQUENCY_FACTORS in self.unread else None
        for name, module in list(self.model.named_modules()):
            self._go_to(name)
            if name.rpartition(".")[2] != "rotary_emb":
                continue
            if self.architecture.own_rotary:
                rotary: nn.Module = self._own_rotary().to(self.device)
            else:
                rotary = type(module)(self.config)
                for kind, values in list(rotary.named_buffers()):
                    divided = factors is not None and divides(self.architecture, kind)
                    setattr(rotary, kind, (values / cast("Tensor", factors) if divided else values).to(self.device))
            keep_dtype(rotary, *dict(rotary.named_buffers()))
            self.model.set_submodule(name, rotary)

    def _own_rotary(self) -> HeadRotary:
        factors = [self._divisors(name) for name in rotary_factors(self.bundle, self.architecture, self.model)]
        return HeadRotary(self.config, (factors[0], factors[1]) if factors else None)

    def _divisors(self, name: str) -> Tensor:
        """Return numbers that divide frequencies, fp32 on the CPU."""
        factors = self._floats(name).float().cpu()
        if not bool((factors.isfinite() & (factors > 0)).all()):
            raise WeightsError(f"{self.bundle.path}: {name}: expected positive numbers, found others", EXPORT_AGAIN)
        return factors

    def _check_filled(self) -> None:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        left = [name for name, tensor in tensors.items() if tensor.is_meta] + sorted(self.unread)
        if left:
            raise WeightsError(
                f"{self.bundle.path}: {left[0]} has no place in {type(self.model).__name__} as this version of "
                f"transformers has it, or nothing fills it",
                "Install the version of transformers that constraints.txt names.",
            )
