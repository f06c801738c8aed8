"""Layers: the same numbers as the operations, and at home in everything that is done to modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from packed import numbers, weight

torch = pytest.importorskip("torch")

from torch import nn

from q6k_kernels.formats.types import row_of
from q6k_kernels.weights.layers import PackedEmbedding, PackedLinear
from q6k_kernels.weights.weight import PackedWeight, dequantize, embedding, linear

X = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
TOKENS = torch.tensor([[0, 39], [7, 7]])


class Tied(nn.Module):
    """An embedding and its head, as language models have them, in different places of the tree."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        embed = PackedEmbedding.from_weight(packed, dtype)
        self.body = nn.ModuleDict({"embed": embed, "norm": nn.LayerNorm(packed.k)})
        self.head = PackedLinear.from_weight(packed)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body["embed"](tokens))

    def shares(self) -> bool:
        return self.body["embed"].tiles is self.head.tiles

    def shares_memory(self) -> bool:
        first, second = self.body["embed"].tiles, self.head.tiles
        return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)


@pytest.mark.parametrize("activations", ["auto", "int8", "bf16"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_linear_is_the_operation(scales: str, activations: Any) -> None:
    packed, bias = weight((40, 512), scales), torch.linspace(-1, 1, 40).bfloat16()
    layer = PackedLinear.from_weight(packed, activations=activations)
    assert torch.equal(layer(X), linear(X, packed, activations=activations))
    layer = PackedLinear.from_weight(packed, bias, activations)
    assert torch.equal(layer(X), linear(X, packed, bias, activations))
    assert layer.tiles.data_ptr() == packed.tiles.data_ptr()
    assert layer.bias is not None
    assert layer.bias.data_ptr() == bias.data_ptr()
    assert (layer.weight.shape, layer.weight.tiles is packed.tiles) == ((40, 512), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embedding_is_the_operation(dtype: torch.dtype) -> None:
    layer = PackedEmbedding.from_weight(weight((40, 512)), dtype)
    rows = layer(TOKENS)
    assert (rows.shape, rows.dtype) == ((2, 2, 512), dtype)
    assert torch.equal(rows, numbers((40, 512), dtype=dtype)[TOKENS])
    assert torch.equal(layer.half()(TOKENS), numbers((40, 512), dtype=torch.float16)[TOKENS])


def test_like_torchs_own_layers() -> None:
    packed = weight((40, 512))
    theirs = nn.Linear(512, 40, bias=False, dtype=torch.bfloat16)
    theirs.weight = nn.Parameter(numbers((40, 512)))
    ours = PackedLinear.from_weight(packed)
    torch.testing.assert_close(ours(X).float(), theirs(X).detach().float(), rtol=2**-7, atol=1e-5)
    assert (ours.in_features, ours.out_features, ours.bias) == (512, 40, None)
    embedding = PackedEmbedding.from_weight(packed)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (40, 512)
    assert torch.equal(embedding(TOKENS), nn.functional.embedding(TOKENS, numbers((40, 512))))


def test_a_new_layer_is_zero_and_its_parameters_are_not_trained() -> None:
    layer = PackedLinear(512, 40, bias=True, dtype=torch.float32)
    assert not layer(X).any()
    assert [(name, p.dtype, p.requires_grad) for name, p in layer.named_parameters()] == [
        ("tiles", torch.uint8, False),
        ("bias", torch.float32, False),
    ]
    assert not PackedEmbedding(40, 512)(TOKENS).any()


def test_what_is_shown() -> None:
    shown = "PackedLinear(in_features=512, out_features=40, bias=True, format='q6_k_exact', activations='int8')"
    assert repr(PackedLinear(512, 40, bias=True, format="q6_k_exact", activations="int8")) == shown
    assert repr(PackedEmbedding(40, 512)) == "PackedEmbedding(40, 512, format='q6_k', dtype=torch.bfloat16)"


@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_state_dicts(scales: Any, device: str, assign: bool) -> None:
    bias = torch.linspace(-1, 1, 40)
    source = PackedLinear.from_weight(weight((40, 512), scales), bias)
    assert {name: tensor.dtype for name, tensor in source.state_dict().items()} == {
        "bias": torch.float32,
        "tiles": torch.uint8,
    }
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    layer = PackedLinear(512, 40, bias=True, format=row_of("Q6_K", scales).name, device=device, dtype=torch.float32)
    layer.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(layer(X), source(X))
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    with pytest.raises(RuntimeError, match="size mismatch for tiles"):
        PackedLinear(256, 40).load_state_dict({"tiles": source.tiles})


def by_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


def filled_again(module: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    return module


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "to dtype": lambda module: module.to(torch.float16),
    "to device": lambda module: module.to("cpu"),
    "to device and dtype": lambda module: module.to("cpu", torch.float32),
    "to_empty": filled_again,
    "a copy of every tensor": lambda module: module._apply(lambda tensor: tensor.clone()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": by_torch_save,
    "share_memory": lambda module: module.share_memory(),
}


CONVERTED = {
    "half": torch.float16,
    "to dtype": torch.float16,
    "float": torch.float32,
    "to device and dtype": torch.float32,
}
"""The dtype of rows after those that change it."""


@pytest.mark.parametrize("how", CONVERSIONS)
def test_tiles_come_through_and_stay_shared(how: str) -> None:
    packed = weight((40, 512), "exact")
    model = Tied(packed)
    expected = Tied(weight((40, 512), "exact"), CONVERTED.get(how, torch.bfloat16))(TOKENS)
    assert model.shares()
    tiles = packed.tiles.clone()
    converted = CONVERSIONS[how](model)
    assert isinstance(converted, Tied)
    assert converted.shares()
    assert converted.head.tiles.dtype is torch.uint8
    assert torch.equal(converted.head.tiles, tiles)
    assert torch.equal(converted(TOKENS), expected)
    assert torch.equal(packed.tiles, tiles)


def test_a_layer_in_two_places_is_converted_once() -> None:
    head = PackedLinear.from_weight(weight((40, 512)))
    both = nn.ModuleList([nn.Sequential(head), nn.Sequential(head), PackedLinear.from_weight(head.weight)])
    before = head(X)
    both._apply(lambda tensor: tensor.clone())
    assert both[0][0] is both[1][0]
    assert all(torch.equal(layer(X), before) for layer in both)


def test_layers_of_one_weight_move_with_it() -> None:
    """As torch's own layers do that have one parameter."""
    packed = weight((40, 512))
    first, second = PackedLinear.from_weight(packed), PackedLinear.from_weight(packed)
    before = packed.tiles.data_ptr()
    first._apply(torch.clone)
    assert packed.tiles.data_ptr() != before
    assert first.tiles is second.tiles is packed.tiles is first.weight.tiles
    assert PackedLinear.from_weight(packed.rows(0, 16)).tiles.data_ptr() == packed.tiles.data_ptr()


def test_parameters_that_torch_makes_anew_are_tied_again_by_hand() -> None:
    """With parameters overwritten, or from the meta device, each layer gets its own, as torch's tied layers do."""
    model = Tied(weight((40, 512)))
    before = model(TOKENS)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(torch.clone)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert not model.shares()
    assert torch.equal(model(TOKENS), before)
    model.head.tiles = model.body["embed"].tiles
    assert model.half().shares()
    assert not model.to("meta").to_empty(device="cpu").shares()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_state_of_a_tied_model(device: str) -> None:
    source = Tied(weight((40, 512), seed=1))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    assert len(file.getvalue()) < 1.6 * source.head.tiles.nbytes  # it is in there once
    file.seek(0)
    model = Tied(weight((40, 512), seed=2)).to(device)
    model.load_state_dict(torch.load(file, weights_only=True), assign=device == "meta")
    assert model.shares_memory()
    assert model.shares() == (device == "cpu")
    assert torch.equal(model(TOKENS), source(TOKENS))


def test_a_state_dict_of_parameters_keeps_a_tied_model_tied() -> None:
    source, model = Tied(weight((40, 512), seed=1)), Tied(weight((40, 512), seed=2)).to("meta")
    model.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    assert model.shares()
    assert model.head.tiles is source.head.tiles


def test_meta_layers_can_be_filled() -> None:
    layer = PackedLinear(512, 40, device="meta").to_empty(device="cpu")
    assert layer.tiles.device.type == "cpu"
    layer.load_state_dict(PackedLinear.from_weight(weight((40, 512))).state_dict())
    assert torch.equal(layer(X), linear(X, weight((40, 512))))
    with torch.device("meta"):
        assert PackedEmbedding(40, 512).tiles.is_meta
        assert PackedLinear(512, 40, bias=True).bias.is_meta  # type: ignore[union-attr]


def test_compiling_a_tied_model() -> None:
    model = Tied(weight((40, 512)))
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, TOKENS[:1]):
        assert torch.equal(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedLinear(500, 40), "multiple of 256 long.*found 40 of 500$"),
        (lambda: PackedLinear(512, 0), "found 0 of 512"),
        (lambda: PackedEmbedding(40, 0), "found 40 of 0"),
        (lambda: PackedLinear(512, 40, format="fp8"), "expected one of q6_k, q6_k_exact, .*, mxfp4, found 'fp8'"),
        (lambda: PackedLinear(512, 40, activations="fp8"), "activations: expected auto, int8 or bf16, found 'fp8'"),
        (lambda: PackedLinear(512, 40, dtype=torch.int8), "dtype: expected bfloat16, .*, found torch.int8"),
        (
            lambda: PackedEmbedding(40, 512, dtype=torch.float64),
            "dtype: expected bfloat16, .*, found torch.float64",
        ),
        (
            lambda: PackedLinear.from_weight(weight((3, 20, 256))),
            r"expected \(N, K\), found a stack \(3, 20, 256\)",
        ),
        (lambda: PackedEmbedding.from_weight(weight((3, 20, 256))), r"take one, weight\[expert\]"),
        (
            lambda: PackedLinear.from_weight(weight((40, 512)), torch.zeros(41)),
            r"bias: expected \(40,\) on cpu, found \(41,\) on cpu",
        ),
        (
            lambda: PackedLinear.from_weight(weight((40, 512)), torch.zeros(40, device="meta")),
            r"bias: expected \(40,\) on cpu, found \(40,\) on meta",
        ),
        (lambda: PackedLinear.from_weight(weight((40, 512)), torch.zeros(40).int()), "found torch.int32"),
    ],
)
def test_layers_say_what_they_refuse(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_dense_tensor_used_as_packed_is_said_to_be_stored_so() -> None:
    dense = torch.zeros(4, 256)
    told = (
        r"found a dense tensor of torch.float32 \(4, 256\): the bundle stores it so, and its `info\(name\).format`"
    )
    for use in (
        lambda: linear(torch.zeros(1, 256), dense),  # type: ignore[arg-type]
        lambda: embedding(torch.tensor([0]), dense),  # type: ignore[arg-type]
        lambda: dequantize(dense),  # type: ignore[arg-type]
        lambda: PackedLinear.from_weight(dense),  # type: ignore[arg-type]
        lambda: PackedEmbedding.from_weight(dense),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=told):
            use()
    with pytest.raises(TypeError, match="expected a PackedWeight, found list"):
        linear(torch.zeros(1, 256), [1.0])  # type: ignore[arg-type]
