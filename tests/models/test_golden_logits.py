"""Tiny models against the logits and the tokens that llama.cpp computed for the same files: see scripts/golden."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from golden_cases import CASES, Case, checksum, prompt, weights, write
from golden_dense import DENSE
from golden_gemma4 import GEMMA4
from golden_mixtures import MIXTURES
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import load_model
from q6k_kernels.generate import step_reference
from q6k_kernels.generate.generator import Generator

ALL = CASES | DENSE | GEMMA4 | MIXTURES
GOLDEN = Path(__file__).with_name("golden")
CHUNK = 16  # shorter than the prompts


class TableGelu(torch.nn.Module):
    """gelu as llama.cpp computes it on the CPU: from 16-bit floats to 16-bit floats."""

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.fixture(scope="module", params=ALL)
def golden(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Case, list[int], Any, Any]]:
    """A case, its prompt, what llama.cpp computed, and our model."""
    name: str = request.param
    case, directory = ALL[name], tmp_path_factory.mktemp("golden")
    kept = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    made_of = write(name, case, directory / "model.gguf")
    assert made_of == kept["weights"], "the case has changed: run scripts/golden/golden_logits.py"
    convert(directory / "model.gguf", directory / "out", Options())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model: Any = load_model(directory / "out")
    for module in model.modules():
        if case.gelu and hasattr(module, "act_fn"):
            module.act_fn = TableGelu()
    yield case, prompt(name, case), kept, model
    torch.set_num_threads(before)


def test_logits_are_those_of_llama_cpp(golden: tuple[Case, list[int], Any, Any]) -> None:
    case, ids, kept, model = golden
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0]
    for position, expected in kept["logits"].items():
        difference = (found[int(position)] - torch.tensor(expected)).abs().max() / kept["spread"]
        assert difference < case.tolerance, f"position {position}: {difference:.2g}"


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_are_those_of_llama_cpp(
    golden: tuple[Case, list[int], Any, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the cache, past its windows, with a prompt in chunks."""
    case, ids, kept, model = golden
    if case.gelu:
        monkeypatch.setitem(step_reference.ACTIVATIONS, "gelu_tanh", TableGelu())
    generator = Generator(model, capacity=len(ids) + case.answer, fused=fused, chunk=CHUNK)
    logits = generator.prefill(ids)
    expected = torch.tensor(kept["logits"][str(len(ids) - 1)])
    assert (logits - expected).abs().max() / kept["spread"] < case.tolerance
    assert list(generator.generate(case.answer)) == kept["tokens"]


def test_the_weights_of_a_case_never_change() -> None:
    name = "llama"
    assert checksum(weights(name, CASES[name])) == json.loads((GOLDEN / f"{name}.json").read_text())["weights"]
