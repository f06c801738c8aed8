"""Real model files, converted and compared tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import libgguf
import numpy as np
import numpy.typing as npt
import pytest

import real_models
from ggml_blocks import Kind, dequantised
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.formats import planes
from q6k_kernels.formats.types import WeightType, weight_type
from q6k_kernels.gguf.model import open_gguf

WEIGHTS_AT_ONCE = 1 << 22
BY_GGUF = 1 << 17
"""Weights of a tensor that the slower gguf package dequantises, too."""
PACKED = {"gemma": {"Q5_0": 81, "Q8_0": 10, "Q4_K": 27, "Q6_K": 9}, "smollm2": {"Q4_1": 210, "Q8_0": 1}}
"""Numbers of tensors that are packed, by GGML type; all others are norms in fp32."""
Arrays = dict[str, npt.NDArray[np.generic]]


@pytest.fixture(scope="module", params=real_models.FILES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, real_models.FILES[request.param](tmp_path_factory.mktemp("model"))


def test_its_header_opens_and_tokens_are_read_when_asked(tmp_path: Path) -> None:
    with open_gguf(real_models.gemma(tmp_path)) as source:
        assert source.architecture == "gemma3"
        assert source.is_tied()
        assert sum(1 for _ in source.tensors()) == 236
        assert source.parts[0].kv["tokenizer.ggml.tokens"].count == 262144
        tokens = source.value("tokenizer.ggml.tokens")
    assert len(tokens) == 262144
    assert tokens[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert tokens[1002] == "erm"


@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_every_tensor_is_what_the_references_say(model: tuple[str, Path], tmp_path: Path, scales: str) -> None:
    name, path = model
    result = convert(path, tmp_path / "out", Options(scales=scales))  # type: ignore[arg-type]
    assert result.manifest.tied == {"output.weight": "token_embd.weight"}
    assert result.bytes_out <= 1.06 * result.bytes_in
    stored = {tensor.name: tensor for tensor in result.manifest.tensors}
    packed = Counter[str]()
    with open_gguf(path) as source:
        arrays = _arrays(tmp_path / "out" / "model.safetensors")
        for part, record in source.tensors():
            raw = np.frombuffer(part.read(record.offset, record.nbytes), dtype=np.uint8)
            tensor = stored[record.name]
            if tensor.storage == "plain":
                assert record.type.name == "F32"
                assert arrays[record.name].tobytes() == raw.tobytes()
            else:
                packed[record.type.name] += 1
                _check_planar(tensor, arrays, raw.reshape(record.shape[0], -1))
    assert packed == PACKED[name]


def _arrays(path: Path) -> Arrays:
    """The arrays of a shard, mapped, as bytes of one dimension."""
    content = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(content[:8].view("<u8")[0])
    header = json.loads(content[8 : 8 + length].tobytes())
    places = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
    return {key: content[8 + length + begin : 8 + length + end] for key, (begin, end) in places.items()}


def _check_planar(tensor: StoredTensor, arrays: Arrays, raw: npt.NDArray[np.uint8]) -> None:
    """Compare the weights with those of ggml's own code, and a part of them with the gguf package's."""
    assert tensor.format is not None
    row, (n, k) = weight_type(tensor.format), tensor.shape
    shaped = {
        array.role: arrays[tensor.arrays[array.role].key].view(planes.NUMPY_DTYPES[array.dtype]).reshape(n, -1)
        for array in row.arrays
    }
    step = max(1, WEIGHTS_AT_ONCE // k)
    for begin in range(0, n, step):
        some = {role: array[begin : begin + step] for role, array in shaped.items()}
        weights = _weights(some, row)
        blocks = raw[begin : begin + step]
        expected = libgguf.dequantize_rows(blocks, int(Kind[tensor.type])).reshape(weights.shape)
        if row.chosen_by == "bf16":
            np.testing.assert_allclose(weights, expected, rtol=2.0**-8, atol=0)
            noise = np.linalg.norm(weights - expected) / np.linalg.norm(expected)
            assert 50 < -20 * np.log10(noise) < 65
        else:
            np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32), err_msg=tensor.name)
        if begin == 0:
            few = max(1, BY_GGUF // k)
            np.testing.assert_array_equal(expected[:few], dequantised(blocks[:few], tensor.type))


def _weights(arrays: Arrays, row: WeightType) -> npt.NDArray[np.float32]:
    codes = planes.unpack([arrays[role].view(np.uint8) for role in row.roles[: -len(row.scales)]], row)
    return planes.dequantize(codes, arrays, row)
