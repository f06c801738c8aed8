"""Several texts at once on a GPU: the kernels against the same in plain torch, then models against one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import Tensor, nn

from q6k_kernels import load_model
from q6k_kernels.generate.filters import Filters
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.generate.texts import Text, Texts

pytestmark = pytest.mark.gpu

GPU, PLACES = torch.device("cuda", 0), 32


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to("cuda", dtype)


@pytest.mark.parametrize("texts", [1, 2, 8, 9, 32])
@pytest.mark.parametrize(("dim", "window"), [(128, 0), (128, 40), (256, 0)])
def test_attention(texts: int, dim: int, window: int) -> None:
    dtype, slots = torch.bfloat16, 104 if window else 1032
    angles = random(1032, dim // 2, seed=3)
    norms = [Norm(1 + random(dim, seed=each) / 4, 1e-5) for each in (1, 2)]
    heads = Heads(16, 4, dim, dim**-0.5, None, *norms, angles.cos(), angles.sin())
    run = Kernels(GPU, dtype, PLACES)
    run.reserve(heads)
    shuffled = torch.randperm(PLACES, generator=torch.Generator().manual_seed(texts)).to("cuda")
    position = torch.randint(0, 1000, (PLACES,), generator=torch.Generator().manual_seed(1)).to("cuda")
    q, k, v = random(texts, 24 * dim, dtype=dtype).split([16 * dim, 4 * dim, 4 * dim], dim=1)
    cache = [random(PLACES, 4, slots, dim, dtype=dtype, seed=each) for each in (5, 6)]
    mine, theirs = (Cached(*(each.clone() for each in cache), window, None, shuffled[:texts]) for _ in range(2))
    found = run.attend(q, k, v, heads, mine, position, [nn.Identity()]).halves
    expected = TorchOperations().attend(q, k, v, heads, theirs, position, []).halves
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mine.keys.double(), theirs.keys.double(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mine.values, theirs.values)
    assert not run._counters.any()


@pytest.mark.parametrize("texts", [1, 9, 32])
@pytest.mark.parametrize("vocabulary", [504, 128256])
@pytest.mark.parametrize("hidden", [False, True])
def test_choices(texts: int, vocabulary: int, hidden: bool) -> None:
    run, order = Kernels(GPU, torch.bfloat16, PLACES), torch.Generator().manual_seed(texts)
    places = torch.randperm(PLACES, generator=order).to("cuda")[:texts]
    logits = random(texts, vocabulary, dtype=torch.bfloat16).clamp(max=2.0)
    suppressed = random(PLACES, vocabulary, seed=2) > 1 if hidden else None
    found = []
    for operations in (run, TorchOperations()):
        position, token = (torch.arange(PLACES, device="cuda") for _ in range(2))
        choice = TextsChoice(
            *(places, (position != 3).long(), position, token, torch.zeros(PLACES, 40, dtype=torch.int64).cuda()),
            seed=torch.arange(PLACES, device="cuda"),
            temperature=(torch.arange(PLACES, device="cuda") % 3).float() / 2,
            suppressed=suppressed,
        )
        operations.choose_of_texts(logits, 3.0, choice)
        found.append(choice)
    assert torch.equal(found[0].token, found[1].token)
    assert torch.equal(found[0].chosen, found[1].chosen)
    assert torch.equal(found[0].position, found[1].position)
    assert not run._counted.any()


def bundle_of(name: str, path: Path) -> Path:
    pytest.importorskip("libgguf")
    from model_cases import MODELS

    out, _ = MODELS[name].bundle(path)
    return Path(out)


def prompt(at: int) -> list[int]:
    found: list[int] = torch.randint(3, 96, (5 + 3 * at,), generator=torch.Generator().manual_seed(at)).tolist()
    return found


@pytest.mark.parametrize("name", ["llama 3.1", "gemma3"])
@pytest.mark.parametrize("activations", ["auto", "bf16"])
def test_every_token_is_as_good_as_the_best_alone(name: str, activations: Any, tmp_path: Path) -> None:
    """But for roundings: products of several rows add in another order, and take 16 bits from 9 rows on.

    Logits of a step of 8 bits are off by what those change, and by up to twice as much from each other (see
    `test_gpu_stepping.test_whole_steps`), as may be the best and the chosen one; so may the keys before them.
    """
    out = bundle_of(name, tmp_path)
    model, exact = (
        load_model(out, device="cuda", dtype=torch.float16, activations=each) for each in (activations, "bf16")
    )
    run, names = Texts(model, capacity=120, places=12), dict[Text, int]()
    answers, todo = [list[int]() for _ in range(16)], list(range(16))
    while todo or run.here:
        while todo and run.free:
            at = todo.pop(0)
            names[run.join(prompt(at), 4 + 7 * at % 50)] = at
        for text, token in run.step():
            if token is not None:
                answers[names[text]].append(token)
    assert [len(answer) for answer in answers] == [4 + 7 * at % 50 for at in range(16)]
    worse, noise, equal = list[float](), [0.06], 0
    alone, other = (Generator(each, capacity=120) for each in (model, exact))
    for at, answer in enumerate(answers):
        rows = []
        for generator in (alone, other):
            generator.reset()
            rows.append([generator.prefill(prompt(at))])
            step = generator._fused_step
            assert step is not None
            for token in answer[:-1]:
                rows[-1].append(step(torch.tensor([token], device="cuda"))[0])
                generator.cache.position += 1
        for token, logits, right in zip(answer, *rows, strict=True):
            worse.append(float((logits.max() - logits[token]) / logits.std()))
            noise.append(float((logits - right).abs().max() / right.std()))
            equal += int(logits.argmax()) == token
    assert sorted(worse)[-1 - len(worse) // 100] < 8 * max(noise)
    assert equal > 0.7 * len(worse)


def test_one_text_has_the_tokens_of_a_generator(tmp_path: Path) -> None:
    """Exactly: its steps are the same launches. And drawn with filters, by the same numbers in torch."""
    model = load_model(bundle_of("llama 3.1", tmp_path), device="cuda", dtype=torch.bfloat16)
    for settings in ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "filters": Filters(20, 0.9)}):
        generator = Generator(model, capacity=120, **settings)
        generator.prefill(prompt(5))
        expected = list(generator.generate(60))
        run = Texts(model, capacity=120, places=4)
        run.leave(run.join(prompt(2), 60))  # so that another has its place
        run.join(prompt(5), 60, **settings)  # type: ignore[arg-type]
        found = list[int | None]()
        while run.here:
            found += [token for _, token in run.step()]
        assert found == [*expected, None]


def test_texts_of_all_kinds_at_once(tmp_path: Path) -> None:
    """Graphs for what the texts need at the time; the same tokens again, and with other places."""
    model = load_model(bundle_of("llama 3.1", tmp_path), device="cuda", dtype=torch.float16)
    never = list(range(0, 96, 2))
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 1.1, "filters": Filters(5, 0.9, 0.05, 1.3, 8)},
        {"suppressed": never},
        {"filters": Filters(repeat_penalty=1.5)},
    ]
    answers = []
    for places in (4, 4, 3):
        run, names, found = (
            Texts(model, capacity=100, places=places),
            dict[Text, int](),
            [list[int]() for _ in kinds],
        )
        todo = list(range(len(kinds)))
        while todo or run.here:
            while todo and run.free:
                at = todo.pop(0)
                names[run.join(prompt(at), 20 + 9 * at, **kinds[at])] = at
            for text, token in run.step():
                if token is not None:
                    found[names[text]].append(token)
        answers.append(found)
        assert not set(found[3]) & set(never)
        assert {kind.suppressed for kind, _ in run._recorders} == {False, True}
    assert answers[0] == answers[1]
    assert [len(answer) for answer in answers[2]] == [20, 29, 38, 47, 56]
