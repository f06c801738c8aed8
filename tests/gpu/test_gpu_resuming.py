"""On a GPU, where steps run in vain, a text that begins like the one before gives the logits of all of it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from q6k_kernels import load_model
from q6k_kernels.generate.generator import Generator

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["llama 3.1", "gemma3", "qwen35"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("libgguf")
    from model_cases import MODELS
    from tiny_qwen35 import QWEN35

    made: Any = QWEN35 if request.param == "qwen35" else MODELS[request.param]
    out, _ = made.bundle(tmp_path_factory.mktemp("resuming"))
    return load_model(out, device="cuda", dtype=torch.float16, activations="bf16")


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_turns_go_on_behind_an_answer_or_within_it(model: Any) -> None:
    generator = Generator(model, capacity=600)

    def resumed(ids: list[int]) -> int:
        found, whole = generator.resume(ids), Generator(model, capacity=600).prefill(ids)
        assert float((found - whole).abs().max() / whole.std()) < 0.1
        return generator.reused

    def answered(count: int) -> list[int]:
        tokens = generator.generate(count + 40)
        answer = [next(tokens) for _ in range(count)]
        tokens.close()
        return answer

    generator.resume(text(50))
    said = text(50) + answered(30)
    assert resumed([*said, *text(20, 1)]) > 30
    said += text(20, 1) + answered(150)
    resumed([*said[:-1], *text(9, 2)])  # within the last steps
    resumed([*said[:96], *text(40, 3)])  # the answer is written anew
    resumed([*said[:20], *text(30, 4)])
