"""Verification of every weight type: what is recomputed, what is measured, and which wrong byte is found where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ggml_blocks
from broken_bundles import SHARD, edit_manifest, only_finding, tensor_edit
from gguf_builder import Builder, Tensor
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.verify import comparison
from q6k_convert.verify.comparison import Exactness
from q6k_convert.verify.stages import Verification, verify
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle import structure
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import STEPS, ScaleNumber
from q6k_kernels.formats.ggml import GGMLType
from q6k_kernels.formats.types import PACKED_TYPES, WEIGHT_TYPES, WeightType

ROWS = pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
NUMBERS = [(ggml, number) for ggml, numbers in STEPS.items() for number in numbers]


def stored(tmp_path: Path, ggml: str, blocks: ggml_blocks.Bytes, k: int, options: Options) -> tuple[Path, Path]:
    """Convert a model of one tensor `x` with these blocks, in rows of k weights; return source and bundle."""
    shape = (2, ggml_blocks.ALL_SIZES[ggml][0] * len(blocks) // k // 2, k)
    tensor = Tensor("x", shape, int(GGMLType[ggml]), blocks.tobytes())
    source = Builder(tensors=[tensor]).write(tmp_path / "model.gguf")
    return source, convert(source, tmp_path / "out", options).output


def options_of(row: WeightType, *, allow_nonfinite: bool = False) -> Options:
    return Options(scales=row.chosen_by or "bf16", allow_nonfinite=allow_nonfinite)


def blocks_of(ggml: str, k: int = 768) -> ggml_blocks.Bytes:
    return ggml_blocks.random_blocks(ggml, 6 * k // ggml_blocks.ALL_SIZES[ggml][0], seed=4)


def truth_of(blocks: ggml_blocks.Bytes, ggml: str) -> np.ndarray:
    return ggml_blocks.dequantised(blocks.reshape(1, -1), ggml)[0].astype(np.float64)


def exactness(run: Verification) -> Exactness:
    assert run.source is not None
    return run.source.tensors["x"]


@pytest.fixture(params=[1 << 21, 1 << 9], ids=["one piece", "many ranges"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "PIECE_WEIGHTS", request.param)
    monkeypatch.setattr(comparison, "RANGE_PIECES", 2)


@pytest.mark.usefixtures("pieces")
@ROWS
def test_every_weight_type_passes(tmp_path: Path, row: WeightType) -> None:
    source, out = stored(tmp_path, row.ggml, blocks_of(row.ggml), 768, options_of(row))
    run = verify(out, source=source)
    assert run.findings == []
    found = exactness(run)
    assert (found.equal, found.exact, found.nonfinite) == (True, row.chosen_by != "bf16", 0)
    assert (found.max_scale_error == 0) == found.exact


@pytest.mark.parametrize("k", [32, 96, 576])
@pytest.mark.parametrize("ggml", [row.ggml for row in WEIGHT_TYPES.values() if row.block == 32])
def test_rows_need_no_whole_super_blocks(tmp_path: Path, ggml: str, k: int) -> None:
    source, out = stored(tmp_path, ggml, blocks_of(ggml, k), k, Options())
    run = verify(out, source=source)
    assert run.findings == []
    assert exactness(run).exact


@ROWS
def test_edges_of_blocks_pass(tmp_path: Path, row: WeightType) -> None:
    """Zero, subnormal, negative and largest scales; codes all zeros and all ones."""
    blocks = ggml_blocks.edge_blocks(row.ggml)
    source, out = stored(tmp_path, row.ggml, blocks, 2 * row.block, options_of(row))
    run = verify(out, source=source)
    assert run.findings == []
    assert exactness(run).exact == (row.chosen_by != "bf16")


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("row", "role"),
    [pytest.param(r, role, id=f"{r.name}-{role}") for r in WEIGHT_TYPES.values() for role in r.roles],
)
def test_a_wrong_byte_of_every_array_is_found_and_measured(tmp_path: Path, row: WeightType, role: str) -> None:
    """The forger corrects the checksum, so only the source tells. The noise is that of the weights then read."""
    blocks = blocks_of(row.ggml)
    source, out = stored(tmp_path, row.ggml, blocks, 768, options_of(row))
    key = f"x.{role}"
    entry = structure.read_header(out / SHARD)[key]
    at = (entry.end - entry.begin) * 2 // 3 & ~1  # the low byte of a 16-bit number, so that it stays finite
    raw = bytearray((out / SHARD).read_bytes())
    raw[entry.begin + at] ^= 0x11
    (out / SHARD).write_bytes(raw)
    right = manifests.checksum(bytes(raw[entry.begin : entry.end]))
    tensor_edit("x", lambda t: t["arrays"][role].update(checksum=right))(out)

    run = verify(out, source=source)
    found = only_finding(run, "source")
    assert (found.file, found.tensor, found.array) == (SHARD, "x", key)
    assert f"differs from the source at byte {at} of the array" in found.problem
    measured, truth = exactness(run), truth_of(blocks, row.ggml)
    finite = np.isfinite(truth)  # the largest powers of two of MXFP4 overflow in fp32
    truth, wrong = truth[finite], read_weights(out, row)[finite].astype(np.float64)
    assert not measured.equal
    assert not measured.exact
    assert measured.signal == pytest.approx(float(np.square(truth).sum()), rel=1e-6)
    assert measured.noise == pytest.approx(float(np.square(wrong - truth).sum()), rel=1e-6)
    assert measured.noise > 0


@pytest.mark.parametrize("role", ["scale", "min"])
@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_scales_of_more_than_six_bits_are_found(tmp_path: Path, name: str, role: str) -> None:
    """The forger corrects the checksum; no source is needed, as no file holds such scales."""
    row = WEIGHT_TYPES[name]
    _, out = stored(tmp_path, row.ggml, blocks_of(row.ggml), 768, options_of(row))
    entry = structure.read_header(out / SHARD)[f"x.{role}"]
    raw = bytearray((out / SHARD).read_bytes())
    for most, problems in ((63, []), (64, [f"holds 64: scales of {name} have six bits, at most 63"])):
        raw[entry.begin + 5] = most
        (out / SHARD).write_bytes(raw)
        right = manifests.checksum(bytes(raw[entry.begin : entry.end]))
        tensor_edit("x", lambda t, right=right: t["arrays"][role].update(checksum=right))(out)
        found = verify(out).findings
        assert [(finding.problem, finding.tensor, finding.array) for _, finding in found] == [
            (problem, "x", f"x.{role}") for problem in problems
        ]


def read_weights(bundle: Path, row: WeightType) -> np.ndarray:
    """Return the weights of `x` in a bundle, flat, by the definition of its planes."""
    raw, header = (bundle / SHARD).read_bytes(), structure.read_header(bundle / SHARD)
    arrays = {}
    for array in row.arrays:
        entry = header[f"x.{array.role}"]
        arrays[array.role] = np.frombuffer(raw[entry.begin : entry.end], planes.NUMPY_DTYPES[array.dtype])
    codes = [arrays[array.role].view(np.uint8) for array in row.arrays if array not in row.scales]
    return planes.dequantize(planes.unpack(codes, row), arrays, row)


def broken(ggml: str, number: ScaleNumber, block: int) -> ggml_blocks.Bytes:
    """Return blocks of which one has a NaN or infinite scale."""
    blocks = blocks_of(ggml)
    word = blocks[block, number.at : number.at + number.size]
    word |= np.frombuffer(number.mask.to_bytes(number.size, "little"), np.uint8)
    return blocks


@pytest.mark.parametrize(("ggml", "number"), [pytest.param(g, n, id=f"{g}-{n.name}") for g, n in NUMBERS])
def test_every_scale_that_is_not_finite_is_found(tmp_path: Path, ggml: str, number: ScaleNumber) -> None:
    """In whatever form it is stored: packed ones in the content, others from the source."""
    block = len(blocks_of(ggml)) * 2 // 3
    blocks = broken(ggml, number, block)
    options = Options(scales="exact", other="raw", allow_nonfinite=True)
    source, out = stored(tmp_path, ggml, blocks, 768, options)
    run = verify(out, source=source)
    assert run.findings == []
    assert exactness(run).nonfinite == 1
    assert run.content is not None
    assert run.content.nonfinite == ({"x": 1} if ggml in PACKED_TYPES else {})

    edit_manifest(out, lambda content: content["options"].update(allow_nonfinite=False))
    run = verify(out, source=source)
    found = only_finding(run, "content" if ggml in PACKED_TYPES else "source")
    assert "1 of its " in found.problem
    assert "NaN or infinite" in found.problem
    row, column = divmod(block, len(blocks) // 6)
    if ggml in PACKED_TYPES:
        assert found.problem.endswith(f"the first at matrix {row // 3}, row {row % 3}, column {column}")
        assert found.array is not None
    else:
        offset = source.stat().st_size - 32 * (-(-blocks.nbytes // 32)) + block * blocks.shape[1] + number.at
        place = f"first {number.name} of block {block} (row {row}, block {column} of it) at byte {offset}"
        assert place in found.problem
        assert found.file == "model.gguf"


@pytest.mark.parametrize("ggml", ["Q2_K", "Q3_K", "IQ3_S", "TQ2_0"])
def test_a_dequantised_scale_that_is_not_finite_is_found(tmp_path: Path, ggml: str) -> None:
    blocks = broken(ggml, STEPS[ggml][0], 5)
    source, out = stored(tmp_path, ggml, blocks, 768, Options(allow_nonfinite=True))
    assert verify(out, source=source).findings == []
    edit_manifest(out, lambda content: content["options"].update(allow_nonfinite=False))
    assert "of block 5 (row 1, block 2 of it)" in only_finding(verify(out, source=source), "source").problem


@ROWS
def test_scales_that_may_be_nan_do_not_spoil_the_figures(tmp_path: Path, row: WeightType) -> None:
    blocks = broken(row.ggml, STEPS[row.ggml][0], 7)
    source, out = stored(tmp_path, row.ggml, blocks, 768, options_of(row, allow_nonfinite=True))
    found = exactness(verify(out, source=source))
    assert found.nonfinite == 1
    assert found.exact == (row.chosen_by != "bf16")
    if not found.exact:
        assert found.snr_db is not None
        assert found.snr_db > 50
        assert found.max_scale_error is not None
        assert found.max_scale_error <= 2.0**-8


@pytest.mark.parametrize("wrong", WEIGHT_TYPES)
@ROWS
def test_a_format_of_another_type_is_refused_by_name(tmp_path: Path, row: WeightType, wrong: str) -> None:
    _, out = stored(tmp_path, row.ggml, blocks_of(row.ggml), 768, options_of(row))
    tensor_edit("x", lambda t: t.update(format=wrong))(out)
    problems = {finding.problem for _, finding in verify(out, fast=True).findings}
    if wrong == row.name:
        assert not problems
    elif WEIGHT_TYPES[wrong].ggml == row.ggml:
        assert f"option scales {row.chosen_by} gives {row.ggml} as {row.name}, found {wrong}" in problems
    else:
        assert problems == {f"{row.ggml} of shape [2, 3, 768] cannot be stored as {wrong}"}


@pytest.mark.parametrize(
    "shape", [[2, 3, 784], [2, 4, 768], [6, 768], [3, 2, 768], [2, 3, 384], [4608], [1, 2, 3, 768]]
)
@ROWS
def test_a_shape_that_does_not_fit_is_refused_by_name(tmp_path: Path, row: WeightType, shape: list[int]) -> None:
    _, out = stored(tmp_path, row.ggml, blocks_of(row.ggml), 768, options_of(row))
    tensor_edit("x", lambda t: t.update(shape=shape))(out)
    found = verify(out, fast=True).findings
    assert found
    for _, finding in found:
        assert finding.tensor == "x"
        refused = f"{row.ggml} of shape {shape} cannot be stored as {row.name}"
        assert finding.problem == refused or finding.problem.startswith(f"expected x.{finding.array} ")
