"""What the keys of Qwen 3.5 must say, and that its blocks of multi-token prediction are told and left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q6k_convert.cli.tables import memory
from q6k_convert.run.memory import bundle_memory
from q6k_kernels import load_model
from q6k_kernels.bundle import manifest
from q6k_kernels.errors import HyperparameterError, UnsupportedModelError
from q6k_kernels.export.exportable import ExportableModel
from tiny_qwen35 import QWEN35


def test_blocks_of_prediction_are_told_left_out_and_not_exported(tmp_path: Path) -> None:
    out, _ = replace(QWEN35, predicting=1).bundle(tmp_path)
    told = bundle_memory(out, manifest.read(out), 64)
    assert told["tensors_beside"] == 2
    assert told["cache_problem"] is None
    assert memory(told).endswith("together; without 2 tensors of encoders or for predicting several tokens")
    model: Any = load_model(out)
    assert len(model.model.layers) == 4
    with pytest.raises(UnsupportedModelError, match="hold the states of layers of kind linear_attention"):
        ExportableModel(model, 64)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.dimension_sections": None}, "rope.dimension_sections: expected three or four numbers, found None"),
        (
            {"attention.recurrent_layers": [True]},
            "recurrent_layers: expected a value for each of 4 layers, found 1",
        ),
        ({"ssm.group_count": 3}, "ssm.group_count: expected a divisor of 8 value heads, found 3"),
        (
            {"ssm.inner_size": 64},
            "ssm.inner_size: expected 256, ssm.time_step_rank heads of ssm.state_size, found 64",
        ),
        ({"rope.dimension_count": 128}, "rope.dimension_count: expected 2 to 96, found 128"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers: expected 0 to 3, found 4"),
    ],
)
def test_keys_that_cannot_be_are_named(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    out, _ = replace(QWEN35, keys=keys).bundle(tmp_path)
    with pytest.raises(HyperparameterError, match=message):
        load_model(out)
