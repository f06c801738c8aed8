"""Filters, penalties and likelihoods in recorded steps: tokens as of single steps, and as chosen on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from q6k_kernels import load_model
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.sampling import choose
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TokenChoice, TorchOperations

pytestmark = pytest.mark.gpu

OPTIONS = [
    Filters(top_k=20),
    Filters(top_p=0.9),
    Filters(min_p=0.05),
    Filters(repeat_penalty=1.3),
    Filters(repeat_penalty=1.3, repeat_last=16),
    Filters(top_k=40, top_p=0.95, min_p=0.01, repeat_penalty=1.1),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("libgguf")
    from model_cases import MODELS

    out, _ = MODELS["qwen3"].bundle(tmp_path_factory.mktemp("filters"))
    return load_model(out, device="cuda", dtype=torch.bfloat16)


def prompt() -> list[int]:
    return torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("filters", OPTIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.1])
@pytest.mark.parametrize("fused", [True, False])
def test_recorded_steps_choose_what_single_ones_do(
    model: Any, filters: Filters, temperature: float, fused: bool
) -> None:
    def made() -> Generator:
        more: dict[str, Any] = {"temperature": temperature, "seed": 7, "filters": filters, "logprobs": 3}
        generator = Generator(model, capacity=160, fused=fused, **more)
        generator.prefill(prompt())
        return generator

    single, recorded = made(), made()
    tokens = [int(single._token)]
    with single._our_attention():
        for _ in range(99):
            single.step(single.cache.slots)
            tokens.append(int(single._token))
    assert list(recorded.generate(100)) == tokens
    assert single.likelihoods is not None
    assert recorded.likelihoods is not None
    both = (each.read(21, tokens) for each in (single.likelihoods, recorded.likelihoods))
    for one, other in zip(*both, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.likeliest[0][1] == pytest.approx(other.likeliest[0][1], abs=1e-4)
        assert one.logprob <= one.likeliest[0][1]


@pytest.mark.parametrize("filters", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [500, 128256, 262144])
def test_choices_are_those_of_the_cpu(filters: Filters, vocabulary: int) -> None:
    """Functions differ in their last bits, so a token at a filter's edge may be drawn on one side only: rarely."""
    same = 0
    for at in range(20):
        logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(at))
        text, seed = torch.arange(64) * 7, torch.tensor([at])
        given = logits.bfloat16().float(), torch.tensor([40 + at]), seed, torch.tensor([0.8])
        on_cpu = choose(*given, None, filters, text)
        found = [choose(*(each.cuda() for each in given), None, filters, text.cuda()) for _ in range(3)]
        assert len({int(each) for each in found}) == 1
        same += int(found[0]) == int(on_cpu)
    assert same >= 19


@pytest.mark.parametrize("filters", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("vocabulary", [500, 128256])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_kernel_draws_from_what_filters_leave(filters: Filters, vocabulary: int, softcap: float | None) -> None:
    run = Kernels(torch.device("cuda", 0), torch.bfloat16)
    for at in range(20):
        logits = (3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(at))).bfloat16().cuda()
        found = []
        for operations in (run, TorchOperations()):
            position, token, seed = (torch.tensor([each], device="cuda") for each in (40 + at, 9, at))
            chosen = torch.zeros(100, dtype=torch.int64, device="cuda")
            operations.choose(logits, softcap, TokenChoice(position, token, chosen, seed, 0.9, None, filters))
            found.append((int(position), int(token), int(chosen[41 + at])))
        assert found[0] == found[1]
