"""`num_parameters` of models that a bundle fills: weights, however many bytes hold them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from q6k_kernels.weights.byte_layers import ByteEmbedding
from q6k_kernels.weights.casting import Castable
from q6k_kernels.weights.layers import PackedEmbedding
from q6k_kernels.weights.weight import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDE = "wide"
"""Attribute of a module: the names of its parameters that are buffers, as they keep their dtype."""
_EMBEDDINGS = nn.Embedding, PackedEmbedding, ByteEmbedding


class Counter:
    """The method `num_parameters` of one model.

    Args:
        model: a model that a bundle has filled, or a part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of weights, as transformers' model of the GGUF file has it.

        Args:
            only_trainable: whether to count only those that have gradients, which packed ones never have.
            exclude_embeddings: whether to leave out embeddings, and heads that share their weights.
        """
        found, seen = 0, set[int]()
        for module in self._model.modules():
            excluded = exclude_embeddings and isinstance(module, _EMBEDDINGS)
            for tensor, count in _weights(module):
                if id(tensor) not in seen and not excluded and (tensor.requires_grad or not only_trainable):
                    found += count
                seen.add(id(tensor))
        return found


def attach_counter(model: PreTrainedModel) -> None:
    """Give a model that was filled from a bundle, and the models in it, the method that counts its weights."""
    for module in model.modules():
        if hasattr(module, "num_parameters"):  # as models of transformers have
            module.__dict__["num_parameters"] = Counter(module)


def _weights(module: nn.Module) -> list[tuple[Tensor, int]]:
    """Return the tensors that hold a module's own weights, one for each, and the number of these."""
    kept = module.kept if isinstance(module, Castable) else ()
    plain: list[Tensor] = [each for name, each in module.named_parameters(recurse=False) if name not in kept]
    plain += [getattr(module, name) for name in getattr(module, WIDE, ())]
    found = [(each, each.numel()) for each in plain]
    if kept:
        weight: Any = module.weight  # of each class another type
        count = math.prod(weight.shape) if isinstance(weight, PackedWeight) else weight.codes.numel()
        found.append((getattr(module, kept[0]), count))
    return found
