"""What architectures' rows say, where kernels and steps rely on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import model_cases
from q6k_kernels import load_model
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.generate import norm_cuda
from q6k_kernels.models.registry import ARCHITECTURES, architecture_of
from tiny_models import Tiny


def test_norms_are_centred_where_a_kernel_for_it_is_built() -> None:
    """Further norms and mixtures come from experts alone, which no architecture of centred norms has."""
    centred = {name for name, row in ARCHITECTURES.items() if row.norms.centred}
    assert centred == {"command-r", "cohere2"}
    assert not [name for name in centred if ARCHITECTURES[name].experts or ARCHITECTURES[name].value_norms]
    built = {(kernel, dict(macros)["Q6K_CENTRED"]) for _, kernel, macros in norm_cuda.variants(())}
    assert {kernel for kernel, yes in built if yes} == set(norm_cuda.CENTRED)
    assert {kernel for kernel, yes in built if not yes} > set(norm_cuda.CENTRED)


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_the_axes_of_a_position_are_those_of_transformers_rotary_embedding(name: str, tmp_path: Path) -> None:
    tiny: Tiny = model_cases.MODELS[name]
    out, _ = tiny.bundle(tmp_path)
    model: Any = load_model(out)
    sections = hasattr(model.model.rotary_emb, "mrope_section")
    assert architecture_of(read_metadata(out)).rotation.axes == (3 if sections else 1)
