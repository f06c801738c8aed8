"""The supported architectures: the rows of all families."""

from __future__ import annotations

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models import (
    cohere,
    gemma,
    gemma4,
    glm,
    gpt_oss,
    granite,
    llama,
    llama_like,
    olmo,
    phi,
    qwen,
    qwen3moe,
    qwen35,
)
from q6k_kernels.models.architecture import Architecture
from q6k_kernels.models.hyperparameters import ONLY_FUNCTIONS

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for family in (
        llama,
        llama_like,
        granite,
        olmo,
        phi,
        glm,
        cohere,
        gpt_oss,
        qwen,
        qwen3moe,
        qwen35,
        gemma,
        gemma4,
    )
    for row in family.ROWS
}
"""The rows by `general.architecture`."""


def architecture_of(metadata: Metadata) -> Architecture:
    """Return the architecture that the metadata names.

    Raises:
        UnsupportedModelError: the metadata names none, or one that is not in `ARCHITECTURES`.
    """
    name = metadata.architecture
    if name not in ARCHITECTURES:
        found = repr(name[:80]) if name else "none"
        raise UnsupportedModelError(
            f"{metadata.path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, found {found}",
            ONLY_FUNCTIONS,
        )
    return ARCHITECTURES[name]
