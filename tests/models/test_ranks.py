"""Models that are divided among processes compute what one process does, and each of them loads its part alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DistributedConfig

from bundle_helpers import fork
from dense_cases import OLMO3, PHI4_MINI
from model_cases import IDS, MODELS
from q6k_kernels import load_model
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.export.exportable import ExportableModel
from q6k_kernels.generate import stepping
from q6k_kernels.generate.generator import Generator
from q6k_kernels.models import ranks as ranks_module
from q6k_kernels.models.cpu_form import to_bytes
from q6k_kernels.models.ranks import Ranks, Share
from q6k_kernels.models.splitting import in_all_layers, ranks_of
from test_pretrained import write_config
from tiny_gpt_oss import GPT_OSS
from tiny_mixtures import QWEN3MOE
from tiny_models import F16, F32, Q8_0, Tiny
from tiny_qwen35 import QWEN35

SIZES = (3, 2)
UNEVEN = Tiny(
    "llama",
    "llama",
    {
        "num_key_value_heads": 4,  # on three ranks the columns of a head begin inside a block
        "intermediate_size": 768,
        "vocab_size": 104,
        "attention_bias": True,
        "mlp_bias": True,
    },
    types={"*attn_v.weight": Q8_0},
    seed=3,
)
DENSE_WEIGHTS = replace(UNEVEN, types={"*norm.weight": F32, "*.bias": F32, "*": F16})
SHORT_BLOCKS = {"*attn_output.weight": Q8_0, "*ffn_down.weight": Q8_0}
"""Types whose blocks let so few columns be divided."""
CASES: dict[str, Any] = {
    "uneven": UNEVEN,
    "not packed": DENSE_WEIGHTS,
    "fewer heads than ranks, tied": MODELS["gemma2"],
    "qwen3moe": QWEN3MOE,
    "gpt-oss": GPT_OSS,
    "gathered": replace(OLMO3, types=SHORT_BLOCKS),
    "joined, tied": replace(PHI4_MINI, types=SHORT_BLOCKS),
    "delta net": QWEN35,
}
NOT_BY_OUR_STEP = {
    ("uneven", 3): "columns of several ranks in one block",
    ("gathered", 3): "columns of several ranks",
    ("joined, tied", 3): "columns of several ranks",
}
"""Models that our own step does not compute on so many ranks."""
BOTH = ("uneven", "qwen3moe", "not packed")
"""Models that are divided among two ranks as well as three."""
TOKENS = 3
CLOSE = 2e-4
"""Of logits up to 4: a hundred roundings of fp32, as sums have another order."""


@pytest.fixture(autouse=True)
def no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers believe that accelerate is there: it asks for it, and for one device makes no use of it."""
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each model's bundle, and transformers' model of its weights."""
    found = {}
    for at, (name, tiny) in enumerate(CASES.items()):
        found[name] = tiny.bundle(tmp_path_factory.mktemp(f"model{at}"))
        write_config(found[name][0])
    return found


def loaded(bundle: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        bundle, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    )


def answers(model: Any) -> dict[str, Any]:
    """What a rank computes and holds."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(IDS).logits
    steps = dict[bool, Any]()
    for fused in (False, True):
        try:
            generator = Generator(model, capacity=64, fused=fused)
        except UnsupportedModelError as error:
            steps[fused] = str(error)
            continue
        generator.prefill(IDS[0].tolist())
        steps[fused] = [*generator.generate(TOKENS)]
    return {
        "logits": logits,
        "generated": model.generate(IDS[:1], max_new_tokens=TOKENS, do_sample=False)[0, -TOKENS:].tolist(),
        "steps": steps,
        "bytes": {name: each.nbytes for name, each in model.named_parameters()},
        "plan": model.tp_plan,
    }


def work(rank: int, bundles: dict[str, Path], folder: Path) -> None:
    """Load and run all models as one of three ranks, then some as one of two."""
    torch.set_num_threads(1)  # the pool of threads is not there after a fork
    for size in SIZES:
        if rank >= size:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        for name, bundle in bundles.items():
            if size == max(SIZES) or name in BOTH:
                torch.save(answers(loaded(bundle)), folder / f"{name} {size} {rank}")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(made: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank found, by "NAME SIZE"."""
    folder = tmp_path_factory.mktemp("ranks")
    bundles = {name: bundle for name, (bundle, _) in made.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: True)
        children = [
            fork(lambda rank=rank: work(rank, bundles, folder), folder / f"log{rank}", covered=True)  # type: ignore[misc]
            for rank in range(max(SIZES))
        ]
        ends = [child.wait() for child in children]
    assert [code for code, _ in ends] == [0] * len(ends), ends
    return {
        f"{name} {size}": [torch.load(folder / f"{name} {size} {rank}") for rank in range(size)]
        for size in SIZES
        for name in made
        if size == max(SIZES) or name in BOTH
    }


RUNS = [(name, 3) for name in CASES] + [(name, 2) for name in BOTH]


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_ranks_compute_what_transformers_does_of_the_whole_weights(
    name: str, size: int, made: dict[str, tuple[Path, Any]], results: dict[str, list[Any]]
) -> None:
    reference = made[name][1]
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = reference(IDS).logits
    tokens = reference.generate(IDS[:1], max_new_tokens=TOKENS, do_sample=False)[0, -TOKENS:].tolist()
    for found in results[f"{name} {size}"]:
        assert float((found["logits"] - expected).abs().max()) < CLOSE
        assert found["generated"] == found["steps"][False] == tokens
        if (reason := NOT_BY_OUR_STEP.get((name, size))) is None:
            assert found["steps"][True] == tokens
        else:
            assert reason in found["steps"][True]


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_all_ranks_compute_the_same_bits(name: str, size: int, results: dict[str, list[Any]]) -> None:
    first, *others = results[f"{name} {size}"]
    assert all(torch.equal(first["logits"], each["logits"]) for each in others)


def held(results: dict[str, list[Any]], run: str, part: str) -> list[int]:
    """Return the bytes of parameters of each rank whose names contain a text."""
    return [sum(nbytes for name, nbytes in each["bytes"].items() if part in name) for each in results[run]]


def test_a_rank_holds_its_own_part_alone(made: dict[str, tuple[Path, Any]], results: dict[str, list[Any]]) -> None:
    whole = dict.fromkeys(("mlp", "lm_head", "embed_tokens", "o_proj", "qkv_proj"), 0)
    for name, each in load_model(made["uneven"][0], weights="packed").named_parameters():
        for part in whole:
            whole[part] += each.nbytes if part in name and "bias" not in name else 0
    for size in SIZES:
        run = f"uneven {size}"
        weights = {
            part: [
                sum(n for name, n in each["bytes"].items() if part in name and "bias" not in name)
                for each in results[run]
            ]
            for part in whole
        }
        for part in ("mlp", "lm_head", "embed_tokens", "qkv_proj"):
            assert sum(weights[part]) == whole[part], part
        # Three ranks: two of them have the second block, each half of it as zeros.
        assert sum(weights["o_proj"]) == whole["o_proj"] * (2 if size == 2 else 3) // 2
    assert held(results, "uneven 3", "down_proj.bias")[1:] == [0, 0]
    assert held(results, "uneven 3", "down_proj.bias")[0] > 0
    shares = held(results, "qwen3moe 3", "experts.")
    assert [share * 8 // sum(shares) for share in shares] == [3, 3, 2]


def test_what_has_too_few_units_is_whole_on_every_rank(results: dict[str, list[Any]]) -> None:
    run = "fewer heads than ranks, tied 3"
    assert len(set(held(results, run, "layers."))) == 1
    assert len(set(held(results, run, "embed_tokens"))) == 1  # 6 tiles
    assert {each["plan"].get("model.layers.*.self_attn.k_proj") for each in results[run]} == {None}
    assert {each["plan"]["lm_head"] for each in results[run]} == {"colwise_gather_output"}
    assert {each["plan"]["model.layers.*.self_attn.k_proj"] for each in results["uneven 3"]} == {"colwise"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that transformers was asked to divide between two ranks."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    return lambda **fields: SimpleNamespace(
        config=SimpleNamespace(distributed_config=SimpleNamespace(**{"tp_size": 2, "tp_plan": None} | fields))
    )


def test_other_divisions_are_refused_by_name(asked: Any) -> None:
    assert ranks_of(asked()) == Ranks(1, 2)
    assert ranks_of(asked(tp_size=1)) is None
    assert ranks_of(cast("Any", SimpleNamespace(config=SimpleNamespace()))) is None
    with pytest.raises(UnsupportedModelError, match="ep_size: packed weights are divided by tp_size alone"):
        ranks_of(asked(ep_size=2))
    with pytest.raises(UnsupportedModelError, match="tp_plan: packed weights are divided by the model's own plan"):
        ranks_of(asked(tp_plan={"lm_head": "colwise"}))
    with pytest.raises(UnsupportedModelError, match="tp_size: expected that of the default group, 2, found 4"):
        ranks_of(asked(tp_size=4))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("units", [0, 1, 5, 8, 13])
def test_shares_cover_all_units_evenly(units: int, size: int) -> None:
    shares = Ranks(0, size).shares(units)
    assert [unit for share in shares for unit in share] == [*range(units)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_step_that_another_rank_lacks_is_none_on_this_one(
    made: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(made["uneven"][0], weights="packed")
    monkeypatch.setattr(stepping, "is_divided", lambda _: True)
    monkeypatch.setattr(dist, "all_reduce", lambda said, *_: said.fill_(0))
    with pytest.raises(UnsupportedModelError, match="no fused decoding step on other ranks"):
        Generator(model, capacity=64, fused=True)


def test_a_divided_layer_refuses_gradients() -> None:
    layer = torch.nn.Linear(4, 4)
    ranks_module.connect(torch.nn.ModuleDict({"layer": layer}), {"layer": Share("own columns", 0, 4)})
    with pytest.raises(UnsupportedModelError, match="divided among ranks cannot train"):
        layer(torch.zeros(1, 4))


def test_what_reads_the_layers_itself_refuses_a_divided_model(made: dict[str, tuple[Path, Any]]) -> None:
    model = load_model(made["uneven"][0], weights="packed")
    ranks_module.connect(model, {"model.layers.0.mlp.down_proj": Share("own columns", 0, 768)})
    with pytest.raises(UnsupportedModelError, match="cannot be exported"):
        ExportableModel(model, 64)
    with pytest.raises(UnsupportedModelError, match="cannot have weights of a byte each"):
        to_bytes(model)


def test_names_in_plans_have_a_star_for_the_number_of_a_layer() -> None:
    assert in_all_layers("model.layers.12.mlp.w1") == "model.layers.*.mlp.w1"


def test_a_map_of_devices_places_modules_and_refuses_the_disk(made: dict[str, tuple[Path, Any]]) -> None:
    bundle, reference = made["uneven"]
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32, device_map={"": "cpu"})
    with torch.no_grad():
        assert float((model(IDS).logits - reference(IDS).logits).abs().max()) < CLOSE
    for device in ("disk", "meta"):
        with pytest.raises((UnsupportedModelError, ValueError), match=device):
            AutoModelForCausalLM.from_pretrained(bundle, device_map={"model": "cpu", "lm_head": device})
