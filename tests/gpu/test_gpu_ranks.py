"""Models on two GPUs: divided among ranks by NCCL, or layers spread by accelerate, beside one GPU and the CPU."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers divides no model without it")

import torch.distributed as dist
from torch import multiprocessing
from transformers import AutoModelForCausalLM, DistributedConfig

from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import load_model
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.generate.generator import Generator
from q6k_kernels.models.hub_files import CONFIG, config
from q6k_kernels.models.skeleton import shapes_of
from q6k_kernels.weights.reader import open_bundle
from synthetic_model import write_model
from synthetic_shapes import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed, torch sees one"),
]

MODELS = {
    "llama": Shape("llama", 3, 512, 1024, 8, 2, 64, 1000),
    "gemma": Shape("gemma", 7, 512, 1024, 8, 2, 64, 1000, 1024, 1_000_000.0, window=16),
    "experts": Shape("experts", 6, 512, 1024, 8, 2, 64, 1000, 1024, 1_000_000.0, 16, (1, 128), (8, 2, 256)),
}
IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
ANSWER = 24
SLACK = 4 << 20
"""Bytes that loading a tiny model takes beside its weights: the planes of a tensor, and what kernels allocate."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, shape in MODELS.items():
        write_model(folder / f"{name}.gguf", shape, 2, "q4_k_m")
        convert(folder / f"{name}.gguf", folder / name, Options())
        content = config(read_metadata(folder / name), shapes_of(open_bundle(folder / name)))
        (folder / name / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return {name: folder / name for name in MODELS}


def chosen(model: Any, *, fused: bool | None, recorded: bool = True) -> tuple[list[int], bool]:
    """Return an answer's tokens, and whether our own step computed them."""
    generator = Generator(model, capacity=128, fused=fused)
    generator.prefill(IDS[0].tolist())
    if recorded:
        return [*generator.generate(ANSWER)], generator.fused
    found = [int(generator._token)]
    with generator._our_attention():
        for _ in range(ANSWER - 1):
            generator.step(generator.capacity)
            found.append(int(generator._token))
    return found, generator.fused


@torch.no_grad()
def answers(model: Any) -> dict[str, Any]:
    ids = IDS.to(model.device)
    return {
        "prompt": model(ids).logits.float().cpu(),
        "token": model(ids[:1, :1]).logits.float().cpu(),
        "ours": chosen(model, fused=None),
        "one by one": chosen(model, fused=None, recorded=False),
        "transformers": chosen(model, fused=False),
        "transformers, one by one": chosen(model, fused=False, recorded=False),
        "held": sum({each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}.values()),
    }


def work(rank: int, port: int, bundles: dict[str, Path], folder: Path) -> None:
    """Load and run all models as one of two ranks."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in named.items()}
    torch.cuda.set_device(rank)
    for name, bundle in bundles.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = AutoModelForCausalLM.from_pretrained(
            bundle, dtype=torch.bfloat16, distributed_config=DistributedConfig(tp_plan="auto")
        )
        peak = torch.cuda.max_memory_allocated() - before
        torch.save(answers(model) | {"peak": peak}, folder / f"{name} {rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each of two ranks found, by model."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, bundles, folder), 2)
    return {name: [torch.load(folder / f"{name} {rank}") for rank in range(2)] for name in bundles}


@pytest.fixture(scope="module")
def of_one(bundles: dict[str, Path]) -> dict[str, Any]:
    """What one GPU finds, by model."""
    return {name: answers(load_model(bundle, device="cuda:0")) for name, bundle in bundles.items()}


@pytest.mark.parametrize("name", MODELS)
def test_two_gpus_are_as_close_to_the_truth_as_one(
    name: str, bundles: dict[str, Path], of_ranks: dict[str, list[Any]], of_one: dict[str, Any]
) -> None:
    truth = load_model(bundles[name], dtype=torch.float32, activations="bf16")
    with torch.no_grad():
        exact = {"prompt": truth(IDS).logits, "token": truth(IDS[:1, :1]).logits}
    if name == "experts":
        del exact["token"]  # a single one may choose other experts by its rounding alone
    for what, expected in exact.items():
        first, second = (found[what] for found in of_ranks[name])
        assert torch.equal(first, second)
        apart, of_single = (float((each - expected).square().mean().sqrt()) for each in (first, of_one[name][what]))
        # Other roundings of the same size: a sum of two parts that are each rounded to bfloat16.
        assert apart < 1.5 * of_single, (what, apart, of_single)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_of_ranks_choose_what_eager_ones_do(name: str, of_ranks: dict[str, list[Any]]) -> None:
    first, second = of_ranks[name]
    for kind in ("ours", "transformers"):
        alone = "one by one" if kind == "ours" else f"{kind}, one by one"
        assert first[kind] == second[kind] == first[alone] == second[alone]
    assert first["ours"][1]
    assert not first["transformers"][1]


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_takes_memory_for_its_own_part_alone(
    name: str, of_ranks: dict[str, list[Any]], of_one: dict[str, Any]
) -> None:
    for found in of_ranks[name]:
        assert found["peak"] < found["held"] + SLACK
        assert found["held"] < 0.75 * of_one[name]["held"]


@pytest.mark.parametrize("spread", ["auto", "by hand"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_on_two_gpus_compute_what_they_do_on_one(name: str, spread: str, bundles: dict[str, Path]) -> None:
    layers = MODELS[name].layers
    places: Any = {f"model.layers.{at}": int(at >= layers // 2) for at in range(layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    device_map = "auto" if spread == "auto" else places
    model = AutoModelForCausalLM.from_pretrained(bundles[name], dtype=torch.bfloat16, device_map=device_map)
    assert set(model.hf_device_map.values()) == {0, 1}
    one = load_model(bundles[name], device="cuda:0")
    with torch.no_grad():
        assert torch.equal(model(IDS.to("cuda:0")).logits.to("cuda:0"), one(IDS.to("cuda:0")).logits)
