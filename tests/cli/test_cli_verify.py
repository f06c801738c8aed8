"""`q6k-convert verify` from the outside: exit codes, JSON, tables, the page, hostile bundles."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bundle_helpers import run_here
from gguf_builder import small_model
from q6k_convert.convert.pipeline import convert
from q6k_kernels.bundle import manifest as manifests

SHARD = "model.safetensors"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out").output


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_good_bundle_ends_with_0_and_says_what_was_checked(bundle: Path) -> None:
    done = run_here("verify", bundle, "--source", bundle.parent / "model.gguf", "--all")
    assert done.returncode == 0, done.stderr
    for words in ("structure  passed", "content    passed", "source     passed", "device     skipped", "verified"):
        assert words in done.stdout
    assert "no CUDA GPU was found" in done.stdout
    for name in ("blk.0.ffn_down_exps.weight", "output_norm.weight"):
        assert name in done.stdout


def test_the_worst_tensors_come_first_and_the_rest_on_request(tmp_path: Path) -> None:
    model = small_model()
    model.tensors += [
        type(model.tensors[0])(f"blk.{i}.attn_v.weight", (1, 256), 14, model.tensors[2].data[:210])
        for i in range(20)
    ]
    source = model.write(tmp_path / "model.gguf")
    convert(source, tmp_path / "out")
    few = run_here("verify", tmp_path / "out", "--source", source).stdout
    every = run_here("verify", tmp_path / "out", "--source", source, "--all").stdout
    assert "the worst 15 of 27 tensors; --all shows every one" in few
    assert "output_norm.weight" not in few
    assert every.count("attn_v.weight") == 20
    lines = [line.split() for line in every.splitlines()]
    figures = [float(line[4]) for line in lines if line[1:2] == ["Q6_K"]]
    assert len(figures) == 23
    assert figures == sorted(figures)
    assert "  Q4_K as q4_k, 1 tensor: exact" in every
    assert "  Q6_K as q6_k, 23 tensors: SNR " in every


def test_a_damaged_bundle_ends_with_5_and_names_the_place(bundle: Path) -> None:
    flip(bundle / SHARD, (bundle / SHARD).stat().st_size - 1)
    done = run_here("verify", bundle)
    assert done.returncode == 5
    assert f"error: {SHARD}, blk.0.ffn_up.weight" in done.stderr or f"error: {SHARD}, " in done.stderr
    assert "checksum is" in done.stderr
    assert "error: verification failed" in done.stderr
    assert "try: Make the bundle again" in done.stderr


@pytest.mark.parametrize("damaged", [False, True])
def test_json_is_one_document_on_stdout(bundle: Path, damaged: bool) -> None:
    if damaged:
        flip(bundle / "metadata.gguf", 100)
    done = run_here("verify", bundle, "--json")
    report = json.loads(done.stdout)
    assert report["status"] == ("failed" if damaged else "verified")
    assert report["exit_code"] == done.returncode == (5 if damaged else 0)
    assert [stage["stage"] for stage in report["stages"]] == ["structure", "content", "source", "device"]
    assert len(report["tensors"]) == 7
    if damaged:
        (finding,) = report["findings"]
        assert (finding["stage"], finding["file"]) == ("content", "metadata.gguf")


def test_a_damaged_manifest_still_gives_a_report(bundle: Path) -> None:
    flip(bundle / "bundle.json", 200)
    page = bundle.parent / "report.html"
    done = run_here("verify", bundle, "--json", "--report", page)
    report = json.loads(done.stdout)
    assert done.returncode == 5
    assert report["findings"][0]["file"] == "bundle.json"
    assert report["tensors"] == []
    assert "failed" in page.read_text(encoding="utf-8")


def test_no_bundle_ends_with_3(tmp_path: Path) -> None:
    done = run_here("verify", tmp_path)
    assert done.returncode == 3
    assert "is not a bundle: it has no bundle.json" in done.stderr


def test_a_broken_source_ends_with_3_and_a_missing_one_with_4(bundle: Path) -> None:
    (bundle.parent / "broken.gguf").write_bytes(b"GGUF")
    assert run_here("verify", bundle, "--source", bundle.parent / "broken.gguf").returncode == 3
    assert run_here("verify", bundle, "--source", bundle.parent / "nowhere.gguf").returncode == 4


def test_cuda_without_a_gpu_ends_with_6(bundle: Path) -> None:
    done = run_here("verify", bundle, "--device", "cuda")
    assert done.returncode == 6
    assert "no CUDA GPU was found" in done.stderr


def test_the_reference_runs_on_the_cpu(bundle: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    done = run_here("verify", bundle, "--device", "cpu", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    runs = {t["name"]: t["device"] for t in report["tensors"] if t["device"]}
    assert set(runs) == {
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.ffn_down_exps.weight",
    }
    assert len(runs["blk.0.ffn_down_exps.weight"]) == 2 * len(runs["token_embd.weight"])
    assert all(r["passed"] and r["worst_error_in_tolerances"] <= 1 for each in runs.values() for r in each)


def test_verifying_imports_no_torch(bundle: Path) -> None:
    driver = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from q6k_convert.cli.main import app\n"
        "result = CliRunner().invoke(app, ['verify', sys.argv[1], '--source', sys.argv[2]])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", driver, str(bundle), str(bundle.parent / "model.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_is_written_whole(bundle: Path) -> None:
    page = bundle.parent / "report.html"
    source = bundle.parent / "model.gguf"
    assert run_here("verify", bundle, "--source", source, "--report", page, "--quiet").returncode == 0
    text = page.read_text(encoding="utf-8")
    assert "blk.0.ffn_down_exps.weight" in text
    assert text.rstrip().endswith("</html>")


def test_the_page_never_replaces_what_is_verified(bundle: Path) -> None:
    source = bundle.parent / "model.gguf"
    before = {path: path.read_bytes() for path in (source, *bundle.iterdir())}
    for page in (bundle / "bundle.json", bundle / "report.html", source):
        done = run_here("verify", bundle, "--source", source, "--report", page)
        assert done.returncode == 2
        assert "lies in the bundle or is the source" in done.stderr
    assert {path: path.read_bytes() for path in (source, *bundle.iterdir())} == before


def test_a_page_that_cannot_be_written_ends_with_4(bundle: Path) -> None:
    done = run_here("verify", bundle, "--report", bundle.parent / "missing" / "report.html")
    assert done.returncode == 4
    assert "No such file or directory" in done.stderr


def signed(directory: Path, name: str, checked: int) -> None:
    """Makes the manifest agree with what was done to a file."""
    content = json.loads((directory / "bundle.json").read_bytes())
    del content["manifest_checksum"]
    with (directory / name).open("rb") as file:
        head = file.read(checked)
    size = (directory / name).stat().st_size
    content["files"][name] = {"size": size, "checked_bytes": checked, "checksum": manifests.checksum(head)}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    content["manifest_checksum"] = manifests.checksum(text.encode())
    (directory / "bundle.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def header_of(length: int, fill: bytes) -> bytes:
    return struct.pack("<Q", length) + (fill * (length // len(fill) + 1))[:length]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (header_of(100_000_000, b'{"a":'), "header of 100000000 bytes"),
        (header_of(16_000_000, b'{"a":'), "the header is not valid JSON"),
        (header_of(16_000_000, b'{"a":1,"a":1,'), "the header is not valid JSON"),
    ],
    ids=["100 MB header", "deep header", "long header"],
)
def test_a_hostile_shard_is_refused_in_little_memory(bundle: Path, head: bytes, words: str) -> None:
    (bundle / SHARD).write_bytes(head)
    signed(bundle, SHARD, 8)
    driver = (
        "import sys, resource\n"
        "from q6k_convert.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    status = open('/proc/self/status').read()\n"
        "    print(int(status.split('VmHWM:')[1].split()[0]), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", driver, "verify", str(bundle), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert words in done.stderr
    assert int(done.stderr.split()[-1]) < 300_000


@pytest.mark.parametrize(
    "text", ["[" * 5_000_000, '{"format":' * 1_000_000, '{"format": "q6k-planar", "version": 99}', "{}", "null"]
)
def test_a_hostile_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    done = run_here("verify", bundle)
    assert done.returncode == 5
    assert "bundle.json" in done.stderr
    assert "Traceback" not in done.stderr
