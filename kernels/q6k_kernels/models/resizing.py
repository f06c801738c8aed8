"""`resize_token_embeddings` of models that a bundle fills: packed rows are neither added nor removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from q6k_kernels.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Resizer:
    """The method `resize_token_embeddings` of one model; programs also call it when nothing is to change.

    Args:
        model: a model that a bundle has filled.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Return the embedding, resized if neither it nor the head is packed.

        Args:
            new_num_tokens: how many tokens there shall be; None for as many as there are.
            pad_to_multiple_of: what the number is to be a multiple of; None for any.
            mean_resizing: as transformers has it.

        Raises:
            UnsupportedModelError: it would have another size, and is packed.
        """
        model: Any = self._model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(embedding) is nn.Embedding and type(head) is nn.Linear:
            resized: nn.Module = type(model).resize_token_embeddings(
                model, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
            return resized
        found = int(embedding.num_embeddings)
        wanted = found if new_num_tokens is None else new_num_tokens
        wanted += -wanted % (pad_to_multiple_of or 1)
        if wanted != found:
            raise UnsupportedModelError(
                f"resize_token_embeddings: packed embeddings keep their size: {found} tokens, not {wanted}",
                f"Use ids below {found} that the vocabulary leaves free; or resize and train transformers' own "
                f"model of the GGUF file, `from_pretrained(..., gguf_file=FILE)`, and convert that.",
            )
        return embedding  # type: ignore[no-any-return]


def attach_resizer(model: PreTrainedModel) -> None:
    """Give a model that was filled from a bundle the method that resizes its embedding."""
    model.__dict__["resize_token_embeddings"] = Resizer(model)
