"""What bench_model.py writes, measures and makes of it, on a tiny model without a GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


from q6k_convert.convert.pipeline import convert
from q6k_kernels import load_model, open_bundle
from q6k_kernels.generate.generator import Generator
from q6k_kernels.gguf.model import open_gguf
from tiny_models import llama3_factors

SCRIPTS = Path(__file__).parents[2] / "scripts"

import bench_model
import bench_model_rows as rows_of
import profile_kernels
import synthetic_model
from profile_kernels import Kernel, shares
from synthetic_gpt_oss import SHAPES as ALL
from synthetic_qwen import SHAPES as QWENS
from synthetic_shapes import SHAPES

TINY, LLAMA, GEMMA = SHAPES["tiny"], SHAPES["llama-8b"], SHAPES["gemma-27b"]
FIGURES = json.loads((SCRIPTS / "bench" / "peer_figures.json").read_text())["whole_model"]
PEERS = [each for each in FIGURES if (each["shape"], each["mix"]) == ("llama-8b", "q6_k")]
CEILINGS = {"read_gb_per_s": 4000.0, "matmul_tflops": 800.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synthetic_model.write_model(path, TINY, threads=2)
    return path


def test_the_types_of_a_mix_are_llama_cpps() -> None:
    more = [
        [i for i in range(32) if synthetic_model.type_of("q4_k_m", f"blk.{i}.{name}.weight", 32).name == "Q6_K"]
        for name in ("attn_v", "ffn_down", "attn_q")
    ]
    between = [6, 9, 12, 15, 18, 21, 24, 27]
    assert more == [[0, 1, 2, 3, *between, 28, 29, 30, 31]] * 2 + [[]]
    assert synthetic_model.type_of("q5_k_m", "output.weight", 32).name == "Q6_K"
    assert synthetic_model.type_of("q5_k_m", "token_embd.weight", 32).name == "Q5_K"


@pytest.mark.parametrize("mix", synthetic_model.MIXES)
def test_every_mix_is_a_sound_file(mix: str, tmp_path: Path) -> None:
    synthetic_model.write_model(tmp_path / "m.gguf", TINY, threads=2, mix=mix)
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        assert tensor.tensor_type.name in ("F32", *(kind.name for kind in synthetic_model.MIXES[mix]))
        if tensor.tensor_type.name != "F32":
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert abs(weights.mean()) < 0.002, tensor.name
            assert 0.015 < weights.std() < 0.025, tensor.name


def test_gemma_has_the_published_sizes_and_reads_windows_and_all_positions() -> None:
    # The published embedding has 64 rows more, for images, than a GGUF's.
    weights = sum(n * k for n, k in GEMMA.linears.values()) + sum(GEMMA.norms.values())
    assert weights + 64 * GEMMA.hidden == 27_009_346_304
    assert synthetic_model.type_of("q4_k_m", GEMMA.head, 62, GEMMA.head).name == "Q6_K"
    assert [GEMMA.windows.count(each) for each in (1024, None)] == [52, 10]
    assert GEMMA.kv_bytes(2048) == 2 * 2 * 16 * 128 * (52 * 1024 + 10 * 2048)
    assert GEMMA.kv_bytes(2048, codes=True) == 2 * 16 * (52 * 1024 * 256 + 10 * 2048 * 132)  # windows keep 16 bits
    row = rows_of.prefill_row(GEMMA, 2048, 0, [1.0], [])
    dense = 2 * (2048 * sum(n * k for name, (n, k) in GEMMA.linears.items() if name != GEMMA.head) + 262144 * 5376)
    pairs = 10 * 2048**2 / 2 + 52 * (1024**2 / 2 + 1024**2)
    assert row["flops"] == dense + 4 * 32 * 128 * pairs


def test_qwens_have_the_published_sizes() -> None:
    """Without vision and prediction: of the mixture a token needs 3 billion."""
    dense, mixture = (QWENS[name] for name in ("qwen35-27b", "qwen36-35b-a3b"))
    weights = {
        shape.name: sum(math.prod(each) for each in (*shape.linears.values(), *shape.stacks.values()))
        for shape in (dense, mixture)
    }
    assert round((weights["qwen35-27b"] + dense.vocabulary * dense.hidden) / 1e9, 1) == 26.9
    assert round((weights["qwen36-35b-a3b"] + mixture.vocabulary * mixture.hidden) / 1e9, 1) == 34.6
    assert round(mixture.multiplied / 1e9, 1) == 2.9
    assert dense.kv_bytes(0) == 2 * 4 * 48 * 48 * 128 * 128


@pytest.mark.parametrize(
    ("name", "mix"), [("tiny-qwen", "q4_k_m"), ("tiny-qwen-moe", "q4_k_m"), ("tiny-gpt-oss", "mxfp4")]
)
def test_a_written_model_runs(name: str, mix: str, tmp_path: Path) -> None:
    synthetic_model.write_model(tmp_path / "m.gguf", ALL[name], threads=2, mix=mix)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    generator = Generator(load_model(tmp_path / "out"), capacity=24, fused=True)
    generator.prefill(list(range(1, 14)))
    assert len(list(generator.generate(4))) == 4


def test_gpt_oss_has_the_published_sizes() -> None:
    """Of which a token needs 3.6 billion, with the rows of embedding and head that it meets."""
    shape = ALL["gpt-oss-20b"]
    stacked = sum(math.prod(each) for each in shape.stacks.values())
    dense, embedding = shape.multiplied - stacked * 4 // 32, shape.vocabulary * shape.hidden
    others = sum(each.size for each in shape.vectors.values()) + sum(shape.norms.values())
    assert round((stacked + dense + embedding + others) / 1e9, 1) == 20.9
    assert round((shape.multiplied + others) / 1e9, 1) == 3.6
    assert shape.kv_bytes(1000) == 2 * 2 * 8 * 64 * 12 * (128 + 1000)
    assert synthetic_model.type_of("mxfp4", "blk.3.ffn_down_exps.weight", 24).name == "MXFP4"


def test_gemma4_has_the_published_sizes() -> None:
    shape = SHAPES["gemma4-31b"]
    weights = sum(n * k for n, k in shape.linears.values()) + sum(shape.norms.values()) + shape.layers
    assert round(weights / 1e9, 1) == 30.7  # as published, of the text part
    assert shape.kv_bytes(2048) == 2 * 2 * (50 * 1024 * 16 * 256 + 10 * 2048 * 4 * 512)
    mixture = SHAPES["gemma4-26b-a4b"]
    stacked = sum(math.prod(each) for each in mixture.stacks.values())
    dense = mixture.multiplied - stacked * 8 // 128
    assert [round(each / 1e9, 1) for each in (dense + stacked, mixture.multiplied)] == [25.2, 3.8]  # as published
    factors = synthetic_model.rotated_quarter(512)
    assert (factors[:64].tolist(), factors[64:].tolist()) == ([1.0] * 64, [float(np.float32(1e30))] * 192)


def test_only_whole_models_have_targets() -> None:
    assert [each.words for each in rows_of.targets_of(GEMMA, "q4_k_m")][2:] == ["200 tokens/s", "8,500 tokens/s"]
    assert rows_of.targets_of(GEMMA.with_layers(6), "q4_k_m") == ()
    assert rows_of.targets_of(TINY, "q6_k") == ()
    assert {(each["shape"], each["mix"]) for each in FIGURES} == set(rows_of.TARGETS) - {("llama-1b", "q6_k")}


@pytest.mark.parametrize(
    ("shape", "mix"), [("tiny", "q4_k_m"), ("tiny-gemma", "q5_k_m"), ("tiny-gemma4-experts", "q8_0")]
)
def test_the_command_measures_every_mix(
    shape: str, mix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--contexts", "24", "--prompts", "16", "--tokens", "2", "--rounds", "1", "--keep", "kept"]
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--shape", shape, "--mix", mix, *options])
    bench_model.main()
    report = json.loads((tmp_path / "bench-model.json").read_text())
    assert (report["mix"], report["shape"]["name"]) == (mix, shape)
    assert [row["what"] for row in report["rows"]] == ["load", "decode", "prefill", "memory"]
    found = {each.type for each in open_bundle(next((tmp_path / "kept").glob("*-bf16"))).manifest.tensors}
    assert found - {"F32"} == {kind.name for kind in synthetic_model.MIXES[mix]}
    packed = report["rows"][-1]["packed_bytes"]
    assert packed < 1.1 * report["gguf_bytes"]


def test_llama_has_the_published_sizes() -> None:
    weights = sum(n * k for n, k in LLAMA.linears.values()) + LLAMA.vocabulary * LLAMA.hidden
    assert weights + sum(LLAMA.norms.values()) == 8_030_261_248
    assert LLAMA.kv_bytes(1) == 131072
    np.testing.assert_allclose(
        synthetic_model.frequency_factors(LLAMA), llama3_factors(128, 500_000.0, 8.0, 1.0, 4.0, 8192), rtol=1e-6
    )


def test_the_smallest_llama_has_the_published_size() -> None:
    """Its head is the embedding, which here is a second matrix of the same size: a token needs as many weights."""
    shape = SHAPES["llama-1b"]
    assert shape.multiplied + sum(shape.norms.values()) == 1_235_814_400
    assert shape.kv_bytes(1) == 32768


def test_a_written_model_is_a_whole_gguf_of_random_weights(model: Path) -> None:
    assert [each.name for each in model.parent.iterdir()] == [model.name]
    with open_gguf(model) as source:
        tensors = {record.name: (part, record) for part, record in source.tensors()}
        assert source.size == model.stat().st_size
        assert {name for name, (_, r) in tensors.items() if r.type.name == "Q6_K"} == {
            "token_embd.weight",
            *TINY.linears,
        }
        seen = set[bytes]()
        for name, (part, record) in tensors.items():
            raw = np.frombuffer(part.read(record.offset, record.nbytes), dtype=np.uint8)
            kind = gguf.GGMLQuantizationType(record.type)
            values = gguf.dequantize(raw.reshape(record.shape[0], -1), kind)
            if name in (*TINY.linears, "token_embd.weight"):
                assert values.shape == TINY.linears.get(name, (512, 256))
                assert np.isfinite(values).all()
                assert values.std() == pytest.approx(0.02, rel=0.2)
                rows = {row.tobytes() for row in raw.reshape(record.shape[0], -1)}
                assert len(rows) == record.shape[0]
                seen.add(raw.tobytes())
            elif name != "rope_freqs.weight":
                np.testing.assert_array_equal(values.reshape(-1), np.ones(256, dtype=np.float32))
        assert len(seen) == len(TINY.linears) + 1


def test_the_command_reports_every_step_and_takes_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--contexts", "8", "20", "--prompts", "16", "--tokens", "4", "--rounds", "3", "--keep", "kept"]
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--device", "cpu", "--shape", "tiny", *options])
    printed = list[str]()
    for _ in range(2):
        bench_model.main()
        printed.append(capsys.readouterr().out)
    assert ("] write" in printed[0], "] write" in printed[1]) == (True, False)
    assert ("] convert" in printed[0], "] convert" in printed[1]) == (True, False)
    report = json.loads((tmp_path / "bench-model.json").read_text())
    found = {row.get("label", row["what"]): row for row in report["rows"]}
    assert list(found) == ["load", "decode @8", "decode @20", "prefill 16", "memory"]
    # 7.0 bits a weight; the head and the embedding are not one.
    matrices = sum(n * k for n, k in TINY.linears.values())
    assert found["memory"]["packed_bytes"] == (matrices + 512 * 256) * 7 // 8
    assert (found["memory"]["capacity"], found["memory"]["kv_bytes"]) == (128, 128 * 2 * 2 * 2 * 64 * 4)
    assert found["decode @8"]["bytes_read"] == (matrices + 256) * 7 // 8 + TINY.kv_bytes(10.5)
    row = found["decode @20"]
    assert len(row["all_ms"]) == 3
    assert row["tokens_per_s"] == pytest.approx(4e3 / sorted(row["all_ms"])[1])
    assert row["ms"] == pytest.approx(sorted(row["all_ms"])[1] / 4)
    assert found["prefill 16"]["tokens_per_s"] == pytest.approx(16e3 / found["prefill 16"]["ms"])
    assert found["load"]["gb_per_s"] == pytest.approx(report["bundle_bytes"] / found["load"]["seconds"] / 1e9)
    assert printed[1].splitlines()[-1].startswith("no targets for this run; ")
    for label in ("decode @8", "decode @20", "prefill 16"):
        assert printed[1].count(f"{label:>14} ") == 2


def test_a_cache_of_8_bits_is_measured_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--contexts", "8", "--prompts", "16", "--tokens", "2", "--rounds", "1", "--cache", "int8"]
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--shape", "tiny", *options])
    bench_model.main()
    report = json.loads((tmp_path / "bench-model.json").read_text())
    assert (report["options"]["cache"], report["options"]["persistent"]) == ("int8", False)
    _, decode, prefill, memory = report["rows"]
    assert memory["kv_bytes"] == 128 * 2 * 2 * 2 * (64 + 4)
    weights = decode["bytes_read"] - 9.5 * 2 * 2 * 2 * (64 + 4)
    assert prefill["bytes_read"] == weights + 16 * 2 * 2 * 2 * (64 + 4)
    assert weights == (sum(n * k for n, k in TINY.linears.values()) + 256) * 7 // 8


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--persistent --device cpu", "it needs --device cuda and --cache model"),
        ("--persistent --cache int8", "it needs --device cuda and --cache model"),
        ("--persistent --no-fused", "leave --no-fused out"),
        ("--cache int8 --no-fused", "leave --no-fused out"),
    ],
)
def test_what_does_not_go_together_is_an_error_at_once(
    options: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_model.parsed(options.split())
    assert problem in capsys.readouterr().err
    assert bench_model.parsed(["--persistent"]).persistent


def judged(row: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    rows_of.judge(row, CEILINGS, PEERS, rows_of.targets_of(LLAMA, "q6_k") if whole else ())
    return row


def test_the_roofline_of_a_token_is_the_time_of_its_bytes() -> None:
    packed = 6_600_000_000
    row = judged(rows_of.decode_row(LLAMA, 2043, 128, packed, [256.0, 300.0, 200.0], [250.0, 290.0, 190.0]))
    read = packed + 131072 * (2043 + 64.5)
    assert row["roofline_tokens_per_s"] == pytest.approx(4e12 / read)
    assert (row["tokens_per_s"], row["gpu_tokens_per_s"], row["ms"]) == (500.0, 512.0, 2.0)
    assert row["roofline_share"] == pytest.approx(500 * read / 4e12)
    assert row["peer_tokens_per_s"] == 201.3
    assert row["targets"] == [{"target": "535 tokens/s", "met": False}]
    assert "targets" in judged(row, whole=False)
    assert row["targets"] == []


def test_the_roofline_of_a_prompt_is_the_longer_of_bytes_and_products() -> None:
    row = judged(rows_of.prefill_row(LLAMA, 2048, 6_600_000_000, [100.0], []))
    body = sum(n * k for name, (n, k) in LLAMA.linears.items() if name != "output.weight")
    flops = 2 * 2048 * body + 2 * 128256 * 4096 + 32 * 32 * 2 * 2 * 128 * 2048**2 / 2
    assert row["roofline_tokens_per_s"] == pytest.approx(2048 * 8e14 / flops, rel=1e-9)
    assert row["roofline_share"] == pytest.approx(flops / 8e14 / 0.1, rel=1e-9)
    assert row["gpu_tokens_per_s"] is None
    assert (row["peer_tokens_per_s"], row["targets"]) == (8545, [{"target": "38,000 tokens/s", "met": False}])
    assert rows_of.line(row).endswith("8545  38,000 tokens/s MISSED")
    short = judged(rows_of.prefill_row(LLAMA, 2, 6_600_000_000, [100.0], []))
    assert short["roofline_tokens_per_s"] == pytest.approx(2 * 4e12 / (6_600_000_000 + 2 * 131072))


def test_what_kernels_add_and_the_gaps_are_all_of_the_time() -> None:
    # b begins while a ends, c after a gap, d within c.
    times = [("a", 10, 20), ("b", 18, 25), ("c", 30, 40), ("d", 31, 35), ("a", 40, 44)]
    kernels = [Kernel(*each) for each in times]
    found = shares(kernels)
    totals = [found[key] for key in ("span_us", "busy_us", "gaps_us", "gaps", "launches")]
    assert totals == [34, 29, 5, 1, 5]
    by_name = {row["name"]: row for row in found["kernels"]}
    assert {name: (row["us"], row["added_us"], row["gap_us"]) for name, row in by_name.items()} == {
        "a": (14, 14, 0),
        "b": (7, 5, 0),
        "c": (10, 10, 5),
        "d": (4, 0, 0),
    }
    assert [row["name"] for row in found["kernels"]] == ["a", "c", "b", "d"]
    assert sum(row["added_us"] for row in found["kernels"]) + found["gaps_us"] == found["span_us"]
    text = profile_kernels.table({"name": "decode", "steps": 2, **found})
    assert "decode: 17.0 us a token, 2.5 launches; idle 14.7%, 0.5 gaps" in text


def test_a_trace_is_what_ran_on_the_gpu() -> None:
    def event(name: str, category: str, ts: float, phase: str = "X") -> dict[str, Any]:
        return {"name": name, "cat": category, "ph": phase, "ts": ts, "dur": 2.5, "args": {"stream": 7}}

    events = [
        event("second", "kernel", 5.0),
        event("first", "kernel", 1.0),
        event("Memset (Device)", "gpu_memset", 3.0),
        event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 4.0),
        event("cudaGraphLaunch", "cuda_runtime", 0.0),
        {"name": "first", "ph": "f", "ts": 1.0},
    ]
    kernels = profile_kernels.kernels_of({"traceEvents": events})
    assert kernels == [Kernel("first", 1.0, 3.5), Kernel("Memset (Device)", 3.0, 5.5), Kernel("second", 5.0, 7.5)]
    with pytest.raises(ValueError, match="saw no kernel"):
        profile_kernels.kernels_of({"traceEvents": events[3:]})
