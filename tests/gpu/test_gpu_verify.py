"""`verify --device cuda` with a GPU: the whole stage, on a bundle made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner

from gguf_builder import small_model, weight
from q6k_convert.cli import main
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

LARGER = [weight("blk.1.ffn_up.weight", (1000, 2048), seed=8), weight("blk.1.exps.weight", (6, 33, 512), seed=9)]


@pytest.fixture(params=["bf16", "exact"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    scales: Literal["bf16", "exact"] = request.param
    model = small_model()
    model.tensors += LARGER
    convert(model.write(tmp_path / "model.gguf"), tmp_path / "out", Options(scales=scales, other="raw"))
    return tmp_path / "out"


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_every_packed_tensor_is_right_on_the_gpu(bundle: Path, device: str) -> None:
    result = CliRunner().invoke(main.app, ["verify", str(bundle), "--device", device, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (stage,) = [stage for stage in report["stages"] if stage["stage"] == "device"]
    assert stage["state"] == "passed"
    assert f"kernels on one {torch.cuda.get_device_name()}" in stage["detail"]
    runs = [run for tensor in report["tensors"] for run in tensor["device"] or ()]
    assert len(runs) == 3 * (1 + 1 + 1 + 2 + 1 + 4)  # embedding, q, k, two experts, ffn_up, four of six experts
    assert {(run["m"], run["activations"]) for run in runs} == {(1, "int8"), (16, "bf16"), (512, "bf16")}
    assert all(run["passed"] and run["seconds"] > 0 and run["gb_per_s"] > 0 for run in runs)
    assert max(run["worst_error_in_tolerances"] for run in runs) > 0.1
