"""How a model is filled: what it shares, what it never has twice, and that it compiles, copies and saves."""

from __future__ import annotations

import copy
import inspect
import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from q6k_kernels import PackedEmbedding, PackedLinear, PackedWeight, load_model, open_bundle
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.formats.tiles import order_rows
from q6k_kernels.formats.types import row_of
from q6k_kernels.models import skeleton as skeletons
from q6k_kernels.models.fusing import Part, Stacks
from q6k_kernels.models.registry import architecture_of
from q6k_kernels.models.stored import row_order
from q6k_kernels.weights.reader import Bundle, Loader
from tiny_models import F16, Q3_K, SIZES, Tiny, permuted
from tiny_qwen35 import QWEN35

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA = Tiny("llama", "llama")
TIED = Tiny(
    "gemma3", "gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 64}, {"attention.sliding_window": 8}
)
QWEN2 = Tiny("qwen2", "qwen2", {"hidden_size": 512})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other with matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LLAMA.bundle(tmp_path_factory.mktemp("llama"))[0]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TIED.bundle(tmp_path_factory.mktemp("tied"))[0]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS).logits
    return result


def test_all_packed_weights_are_in_packed_layers_and_nowhere_else(llama: Path) -> None:
    model: Any = load_model(llama)
    bundle = open_bundle(llama)
    packed = [tensor for tensor in bundle.manifest.tensors if tensor.storage == "planar"]
    assert len(packed) == 2 * 7 + 2
    layers = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    weights = [bundle.load(tensor.name) for tensor in packed]
    assert sum(layer.weight.nbytes for layer in layers) == sum(
        w.nbytes for w in weights if isinstance(w, PackedWeight)
    )
    assert not [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert not model.training
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_projections_with_one_input_are_one(llama: Path) -> None:
    model: Any = load_model(llama, activations="bf16")
    bundle = open_bundle(llama)
    for index, layer in enumerate(model.model.layers):
        for module, name, parts in (
            (layer.self_attn, "qkv_proj", {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}),
            (layer.mlp, "gate_up_proj", {"gate_proj": "ffn_gate", "up_proj": "ffn_up"}),
        ):
            whole = getattr(module, name)
            assert whole.activations == "bf16"
            rows = whole.weight.dequantize(torch.float32)
            for part, gguf_name in parts.items():
                view: Any = getattr(module, part)
                assert isinstance(view, Part)
                single: Any = bundle.load(f"blk.{index}.{gguf_name}.weight")
                expected = single.dequantize(torch.float32)
                if gguf_name in ("attn_q", "attn_k"):
                    expected = expected[row_order(len(expected), SIZES["head_dim"])]
                torch.testing.assert_close(rows[view.begin : view.end], expected, rtol=0, atol=0)


def test_what_projections_give_are_views_of_one_product(llama: Path) -> None:
    attention = load_model(llama).get_submodule("model.layers.0.self_attn")
    products = torch.randn(1, 3, attention.qkv_proj.out_features)  # type: ignore[union-attr, arg-type]
    for name in ("q_proj", "k_proj", "v_proj"):
        part = attention.get_submodule(name)(products)
        assert part.untyped_storage().data_ptr() == products.untyped_storage().data_ptr()


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (3, 8), (1, 2), (33, 10), (40, 128)])
def test_rows_change_places_and_no_bit_changes(heads: int, head_dim: int, scales: str) -> None:
    n, generator = heads * head_dim, torch.Generator().manual_seed(heads)
    planes = [torch.randint(0, 256, (n, width), dtype=torch.uint8, generator=generator) for width in (128, 64, 16)]
    ours = permuted(torch.arange(n).numpy(), heads)  # row i of the file is row ours[i] of the model
    scale = planes[2].view(torch.int8) if scales == "exact" else torch.randn(n, 16, generator=generator).bfloat16()
    steps = [torch.randn(n, 1, generator=generator).half()] if scales == "exact" else []
    model_planes = [planes[0], planes[1], scale, *steps]
    weight = PackedWeight.from_planes([plane[ours] for plane in model_planes], row_of("Q6_K", scales).name)
    order_rows(weight.tiles, row_order(n, head_dim), weight.row)
    for found, expected in zip(weight.planes(), model_planes, strict=True):
        assert torch.equal(found, expected)


def test_a_tied_head_shares_the_packed_embedding(tied: Path) -> None:
    model: Any = load_model(tied)
    assert model.config.tie_word_embeddings
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.tiles.data_ptr() == model.model.embed_tokens.tiles.data_ptr()


def test_a_tied_head_shares_a_plain_embedding(tmp_path: Path) -> None:
    out, reference = replace(TIED, types={"token_embd*": Q3_K}).bundle(tmp_path)
    model: Any = load_model(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-4)


def test_biases_follow_their_rows(tmp_path: Path) -> None:
    out, reference = QWEN2.bundle(tmp_path)
    attention: Any = load_model(out).get_submodule("model.layers.1.self_attn")
    theirs = reference.model.layers[1].self_attn
    expected = torch.cat([theirs.q_proj.bias, theirs.k_proj.bias, theirs.v_proj.bias])
    torch.testing.assert_close(attention.qkv_proj.bias.data, expected, rtol=0, atol=0)


def test_weights_that_cannot_lie_below_each_other_stay_apart(tmp_path: Path) -> None:
    """Keys of 8 rows end within a tile, so values begin a stack of their own."""
    config = {"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 8}
    out, reference = replace(LLAMA, config=config).bundle(tmp_path)
    model: Any = load_model(out)
    stacks = model.model.layers[0].self_attn.qkv_proj
    assert isinstance(stacks, Stacks)
    assert [layer.out_features for layer in stacks.layers] == [264, 8]
    assert isinstance(model.model.layers[0].mlp.gate_up_proj, PackedLinear)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_that_is_not_packed_has_one_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    out, reference = replace(TIED, types={"*ffn_down*": F16, "*attn_v*": Q3_K}).bundle(tmp_path)
    model: Any = load_model(out, dtype=dtype)
    parameters = dict(model.named_parameters())
    assert {each.dtype for name, each in parameters.items() if not name.endswith(".tiles")} == {dtype}
    assert {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} != {}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert model.dtype is dtype
    found, expected = logits(model), logits(reference)
    assert found.dtype is dtype
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.999


def test_nothing_is_allocated_before_weights_are_read(tied: Path) -> None:
    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result.is_meta:
                Watch.largest = max(Watch.largest, result.nbytes)
            return result

    metadata = read_metadata(tied)
    with Watch():
        model = skeletons.skeleton(open_bundle(tied), metadata, architecture_of(metadata), torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert Watch.largest < 1024


def test_only_one_tensor_at_a_time_exists_a_second_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[tuple[str, Any]]()
    load = Loader.__call__

    def watched(self: Loader, name: str, *args: Any, **kwargs: Any) -> Any:
        alive = [each for each, tensor in read if tensor() is not None and each.split(".")[-2] in joined]
        assert not alive, f"{alive} when {name} is read"
        result = load(self, name, *args, **kwargs)
        read.append((name, weakref.ref(result.tiles if isinstance(result, PackedWeight) else result)))
        return result

    joined = {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"}
    monkeypatch.setattr(Loader, "__call__", watched)
    placed = list[int]()
    load_model(llama, progress=placed.append)
    names = [name for name, _ in read]
    tensors = open_bundle(llama).manifest.tensors
    assert sorted(names) == sorted(tensor.name for tensor in tensors)
    stored = load_file(llama / "model.safetensors")
    assert len(placed) == len(names)
    assert sum(placed) == sum(array.nbytes for array in stored.values())


def test_models_compile_as_one_graph(tied: Path) -> None:
    model: Any = load_model(tied)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(found, model(IDS, use_cache=False).logits, rtol=0, atol=1e-5)


def test_copies_and_saved_models_use_layers_of_their_own(llama: Path) -> None:
    model: Any = load_model(llama)
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=0)
        other.model.layers[0].self_attn.qkv_proj.tiles.zero_()
        assert not torch.equal(logits(other), expected)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_state_dicts_go_from_one_model_to_another(llama: Path) -> None:
    model, other = load_model(llama), load_model(llama)
    other.get_submodule("model.layers.1.mlp.gate_up_proj").tiles.zero_()  # type: ignore[operator, union-attr]
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


def test_a_device_is_given_in_the_same_way_everywhere() -> None:
    for function, place in ((load_model, 1), (Bundle.load, 2), (Bundle.load_all, 1), (Bundle.loader, 1)):
        parameters = list(inspect.signature(function).parameters.values())
        assert (parameters[place].name, parameters[place].default) == ("device", "cpu")
        assert parameters[place].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_numbers_that_stay_wide_do_not_pass_for_the_models_dtype(tmp_path: Path) -> None:
    """transformers takes the dtype of a model's first parameter that is floating-point."""
    out, _ = QWEN35.bundle(tmp_path)
    model: Any = load_model(out, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].linear_attn.A_log.dtype == torch.float32
