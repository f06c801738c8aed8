"""Keys and values of 8 bits: the formula, a generator with them, and the kernels that read and write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import Tensor

import real_models
from cuda_emulator.memory import emulate
from families import prompt, tiny
from q6k_convert import convert_gguf
from q6k_convert.run.perplexity import losses, windows_of
from q6k_kernels import load_model
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.generate import heads
from q6k_kernels.generate.cache_codes import LEAST, coded, decoded, mixed
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.texts import Texts
from q6k_kernels.models import cache_layout
from q6k_kernels.tokenizer.tokenizer import load_tokenizer

Make = Callable[[torch.dtype], Kernels]
TEXT = Path(__file__).parents[2] / "scripts" / "bench" / "eval_text.txt"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype)
    memory.check()


def test_codes_are_the_nearest_in_fp64() -> None:
    """But where fp32 rounds to the other side: within 2^-16 of the middle of two, as codes go to 127."""
    vectors = random(50, 128) * random(50, 1, seed=1).exp()
    vectors[0] = 0.0
    vectors[1, 0] = 1e30
    codes, scales = coded(vectors)
    exact = vectors.double().abs().amax(-1).clamp_min(LEAST) / 127
    torch.testing.assert_close(scales.double(), exact, rtol=2.0**-24, atol=0.0)
    quotients = vectors.double() / exact[:, None]
    assert ((codes.double() - quotients).abs() <= 0.5 + 2.0**-16).all()
    assert codes.abs().amax(-1)[1:].eq(127).all()
    assert not codes[0].any()
    assert ((decoded(codes, scales).double() - vectors.double()).abs() <= 0.501 * exact[:, None]).all()
    assert decoded(*coded(torch.full((1, 8), torch.nan))).isnan().all()


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_mixing_leaves_products_and_spreads_what_stands_out(dim: int) -> None:
    queries, keys = random(5, dim).double(), random(7, dim, seed=1).double()
    products = mixed(queries.float()) @ mixed(keys.float()).T
    torch.testing.assert_close(products, (queries @ keys.T).float(), rtol=1e-5, atol=1e-4)
    alone = torch.zeros(dim)
    alone[dim // 2] = 1.0
    together = dim & -dim
    assert mixed(alone).abs().sort().values[-together:].allclose(torch.tensor(together**-0.5))
    assert torch.allclose(mixed(mixed(alone)), alone)


@pytest.mark.parametrize("short", [0, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4", "qwen35"])
def test_a_generator_with_codes(family: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes, nearly the logits of the plain cache, and the same logits for any chunks, and in steps.

    Layers with a short window hold no codes; with `short` 8 those are short that there are.
    """
    monkeypatch.setattr(cache_layout, "SHORT_WINDOW", short)
    ids, model = prompt(), tiny(family)
    found = dict[object, Tensor]()
    for chunk in (64, 7):
        generator = Generator(model, capacity=90, chunk=chunk, cache_type="int8")
        assert generator.fused
        found[chunk] = generator.prefill(ids)
    plain = Generator(model, capacity=90, fused=True)
    found["plain"] = plain.prefill(ids)
    spread = float(found["plain"].std())
    assert float((found[64] - found[7]).abs().max()) < 1e-3 * spread
    assert float((found[64] - found["plain"]).abs().max()) < 0.15 * spread
    for layer, kind in enumerate(generator.cache.kinds):
        if kind != "linear_attention":
            coded_here = kind == "full_attention" or not short
            (keys, values), scales = generator.cache.buffers(layer), generator.cache.scales(layer)
            assert keys.dtype is values.dtype is (torch.int8 if coded_here else torch.float32)
            assert (scales is not None) is coded_here
            whole, ours = (
                sum(each.nbytes for each in (*cache.buffers(layer), *(cache.scales(layer) or ())))
                for cache in (plain.cache, generator.cache)
            )
            assert ours <= (0.4 if coded_here else 1.0) * whole  # of fp32, heads of 8 values: 12 of 32 bytes
    stepped = Generator(model, capacity=90, cache_type="int8")
    stepped.prefill(ids[:-1])
    stepped._token[:] = ids[-1]
    assert stepped._fused_step is not None
    stepped.cache.position.fill_(len(ids) - 1)
    again = stepped._fused_step(stepped._token)[0]
    assert float((again - found[64]).abs().max()) < 1e-3 * spread
    assert len(list(generator.generate(5))) == 5


def test_texts_with_codes_are_those_of_a_generator() -> None:
    ids, model = prompt(), tiny("gemma2")
    alone = Generator(model, capacity=60, cache_type="int8")
    alone.prefill(ids)
    tokens = list(alone.generate(20))
    run = Texts(model, capacity=60, places=2, cache_type="int8")
    both = [run.join(ids, 20), run.join(ids[:9], 20)]
    found = dict[object, list[int | None]]({each: [] for each in both})
    while run.here:
        for text, token in run.step():
            found[text].append(token)
    assert found[both[0]] == [*tokens, None]


def test_what_has_no_codes_is_refused() -> None:
    model, device = tiny("llama"), torch.device("cpu")
    with pytest.raises(UnsupportedModelError, match="transformers' forward pass reads no cache of int8") as failure:
        Generator(model, capacity=8, fused=False, cache_type="int8")
    assert "--cache" in str(failure.value.remedy)
    with pytest.raises(ValueError, match="cache_type: expected model or int8, found 'fp8'"):
        KeyValueCache(model.config, 8, device, cache_type="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", real_models.FILES)
def test_perplexity_of_a_real_model(tmp_path: Path, name: str) -> None:
    """Within 0.5% of that with a cache of the model's numbers, on two windows of a text."""
    pytest.importorskip("gguf")
    convert_gguf(real_models.FILES[name](tmp_path), tmp_path / "out")
    model = load_model(tmp_path / "out", device="cpu", dtype=torch.float32, weights="bytes")
    tokenizer = load_tokenizer(tmp_path / "out", None)
    windows = windows_of(tokenizer, TEXT.read_text(encoding="utf-8"), 128)[:2]
    plain, codes = (losses(model, windows, cache_type=each).mean().exp() for each in ("model", "int8"))
    assert 0 < abs(codes / plain - 1) < 0.005


def test_a_step_on_the_cpu_reads_no_more_than_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else it would take as long as the cache, not the text."""
    sizes = list[int]()

    def watch(codes: Tensor, scales: Tensor) -> Tensor:
        sizes.append(codes.shape[-2])
        return decoded(codes, scales)

    monkeypatch.setattr(heads, "decoded", watch)
    generator = Generator(tiny("llama"), capacity=200, cache_type="int8")
    generator.prefill(prompt(5))
    for length, _ in enumerate(generator.generate(4), 5):
        assert max(sizes) == length
    assert length == 8
