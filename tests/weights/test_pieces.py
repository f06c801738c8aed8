"""Pieces of tensors: the rows, columns and experts that another program reads, and no more read than they need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from devices import DEVICES
from gguf_builder import F32, Q4_K, Q5_0, Q6_K, Q8_0, Builder, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.weights import transfer
from q6k_kernels.weights.reader import open_bundle
from q6k_kernels.weights.transfer import Piece
from q6k_kernels.weights.weight import PackedWeight

TYPES = {"six": Q6_K, "four": Q4_K, "eight": Q8_0, "five": Q5_0, "plain": F32}
N, K = 50, 768
PIECES = [
    Piece(16, 32),
    Piece(7, 40),  # begins and ends inside tiles
    Piece(49, 50),
    Piece(0, N, (256, K)),
    Piece(3, 21, (0, 256)),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    tensors = [weight(name, (N, K), kind, seed=kind) for name, kind in TYPES.items()]
    tensors += [
        weight("stack", (5, 24, 256), Q6_K),
        weight("tiled", (5, 32, 256), Q4_K),
        weight("vector", (N,), F32),
    ]
    convert(Builder(tensors=tensors).write(folder / "in.gguf"), folder / "out", Options(scales="exact"))
    return folder / "out"


@pytest.fixture(scope="module")
def stored(bundle: Path) -> dict[str, torch.Tensor]:
    """All arrays of the bundle, as the safetensors library reads them."""
    return {key: each for file in bundle.glob("*.safetensors") for key, each in load_file(file).items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_of_a_matrix_is_that_of_its_arrays(
    device: str, piece: Piece, bundle: Path, stored: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "CPU_SLICE_BYTES", 17 * 1024)  # several slices
    monkeypatch.setattr(transfer, "GPU_SLICE_BYTES", 17 * 1024)
    load = open_bundle(bundle).loader(device)
    rows, columns = slice(piece.begin, piece.end), piece.columns or (0, K)
    for name in TYPES:
        found = load(name, piece=piece)
        assert tuple(found.shape) == (piece.end - piece.begin, columns[1] - columns[0])
        if isinstance(found, PackedWeight):
            for array, plane in zip(found.row.arrays, found.planes(), strict=True):
                cut = slice(columns[0] // array.weights, columns[1] // array.weights)
                assert torch.equal(plane.cpu(), stored[f"{name}.{array.role}"][rows, cut]), (name, array.role)
        else:
            assert torch.equal(found.cpu(), stored[name][rows, slice(*columns)])
            assert found.is_contiguous()
    assert torch.equal(load("vector", piece=Piece(7, 40)).cpu(), stored["vector"][7:40])  # type: ignore[union-attr]


@pytest.mark.parametrize("device", DEVICES)
def test_experts_of_a_stack_are_those_of_its_arrays(
    device: str, bundle: Path, stored: dict[str, torch.Tensor]
) -> None:
    load = open_bundle(bundle).loader(device)
    for name in ("stack", "tiled"):
        found: Any = load(name, piece=Piece(2, 5))
        for role, plane in zip(found.row.roles, found.planes(), strict=True):
            assert torch.equal(plane.cpu(), stored[f"{name}.{role}"][2:5])


def test_no_more_is_read_than_the_rows_of_a_piece(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, sizes, read = open_bundle(bundle), list[int](), os.preadv

    def counted(file: int, views: Any, at: int) -> int:
        sizes.append(sum(map(len, views)))
        return read(file, views, at)

    monkeypatch.setattr(os, "preadv", counted)
    for name, piece, share in (
        ("four", Piece(10, 20), 10 / N),
        (
            "four",
            Piece(10, 20, (256, 512)),
            10 / N,
        ),  # whole rows: a piece of one is shorter than a page of the disk
        ("plain", Piece(10, 20), 10 / N),
        ("tiled", Piece(1, 3), 2 / 5),
    ):
        sizes.clear()
        opened.loader()(name, piece=piece)
        assert sum(sizes) == opened.info(name).nbytes * share


@pytest.mark.parametrize(
    ("name", "piece", "message"),
    [
        ("six", Piece(40, 51), r"piece: six has the shape \(50, 768\), found"),
        ("six", Piece(-1, 5), "has the shape"),
        ("six", Piece(5, 5), "has the shape"),
        ("six", Piece(0, 5, (512, 1024)), "has the shape"),
        ("vector", Piece(0, 5, (0, 5)), "has the shape"),
        ("stack", Piece(0, 1, (0, 256)), "has the shape"),
        ("six", Piece(0, 5, (32, 256)), "begin and end at multiples of 256"),
        ("eight", Piece(0, 5, (0, 48)), "begin and end at multiples of 32"),
    ],
)
def test_what_is_no_piece_is_refused(name: str, piece: Piece, message: str, bundle: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_bundle(bundle).loader()(name, piece=piece)
