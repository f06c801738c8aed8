"""The C++ example: an exported model continued without Python, and what it says of models that it does not take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from cpp_example import IN_PYTHON, NAME, TORCH, build_example, called, generated
from cpp_library import library
from exported_model import SUPPRESSED, ExportedModel

VERSION = torch.__version__.partition("+")[0]
TEXTS = [(1, 12), (2, 3), (72, 5), (73, 20), (100, 29)]
"""Tokens of a prompt, and new ones: in one chunk and in two, the last of one token; past where a ring of 72 slots
has wrapped; and until the cache is full."""


@pytest.fixture(scope="session")
def example() -> Path:
    return build_example()


def check_refused(done: Any, code: int, told: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.search(told, errors[0]), errors[0]
    assert (done.returncode, done.stdout) == (code, "")


# Tokens


@pytest.fixture(scope="session")
def attentive(exported: ExportedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A package, and its model in transformers: layers so strong that all of the text tells on each token.

    With an output that is the embedding, a tiny random model would repeat the last one.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter

    from q6k_kernels import load_model
    from q6k_kernels.export import program_file

    model: Any = load_model(exported.bundle)
    louder = {f"model.{name}": each for name, each in model.named_parameters() if ".post_" in name}
    entries = {each.name: f"data/weights/{each.entry}" for each in program_file.read(exported.package)[0].constants}
    contents = dict[str, bytes]()
    with torch.no_grad():
        for name, each in louder.items():
            each.add_(1).mul_(40)
            contents[entries[name]] = each.numpy().tobytes()
    assert len(contents) == 4
    package = tmp_path_factory.mktemp("attentive") / "model.pt2"
    with PT2ArchiveReader(str(exported.package)) as old, PT2ArchiveWriter(str(package)) as new:
        for name in old.get_file_names():
            if name.startswith(("data/", "extra/")):
                new.write_bytes(name, contents.get(name) or old.read_bytes(name))
    return package, model


def text(length: int) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def test_tokens_are_those_of_python_and_of_transformers(example: Path, attentive: tuple[Path, Any]) -> None:
    """With the same library in Python, which its loading changes, so in a process of its own."""
    package, model = attentive
    texts = [(text(length), count) for length, count in TEXTS]
    command = (sys.executable, "-c", IN_PYTHON, library(), package, json.dumps(texts))
    of_python = called(*command, OMP_NUM_THREADS="1").splitlines()
    for (ids, count), expected in zip(texts, of_python, strict=True):
        done = generated(example, package, library(), count, *ids)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == expected + "\n"
        answer = [*ids]
        with torch.no_grad():
            for _ in range(count):
                logits = model(torch.tensor([answer])).logits[0, -1]
                answer.append(int(logits.index_fill(0, torch.tensor(SUPPRESSED), -torch.inf).argmax()))
        assert list(map(int, expected.split())) == answer[len(ids) :]
    assert len(set(" ".join(of_python).split())) > 20


def test_what_it_says_when_asked(example: Path, exported: ExportedModel) -> None:
    done = generated(example, "--verbose", exported.package, library(), 3, *text(73))
    assert done.returncode == 0
    assert re.fullmatch(r"\d+ \d+ \d+\n", done.stdout)
    first, prefill, decode = done.stderr.splitlines()
    assert first.startswith("gemma2 in ")
    assert re.fullmatch(r"prefill: 73 tokens in \d+\.\d+ s, \d+\.\d a second", prefill)
    assert decode.startswith("decode: 2 tokens in ")


def test_no_python_is_needed(example: Path, exported: ExportedModel, tmp_path: Path) -> None:
    """By the program, what the programs of a package need, or the library."""
    files = [example, library()]
    with zipfile.ZipFile(exported.package) as archive:
        files += [Path(archive.extract(name, tmp_path)) for name in archive.namelist() if name.endswith(".so")]
    assert len(files) == 4
    for file in files:
        needed = called("ldd", file, LD_LIBRARY_PATH=str(TORCH / "lib"))
        assert "libtorch" in needed
        assert not re.search("libpython|libtorch_python", needed)
    assert "not found" not in called("ldd", example)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("vocabulary 96", "vocabulary 97", r"should give logits, float32 \(1, 97\)"),
        (" keys_0\n", " keys_9\n", "the program prefill asks for 'keys_0', which is not in it"),
        ("state float32 ", "state int32 ", "asks for 'keys_0' of another dtype than Int"),
        ("state float32 1x", "state float32 1000000000x", "its cache takes more than the memory of this machine"),
    ],
)
def test_a_text_that_does_not_go_with_the_programs(
    example: Path, exported: ExportedModel, tmp_path: Path, old: str, new: str, told: str
) -> None:
    path = tmp_path / "model.pt2"
    exported.changed(path, lambda content: content.replace(old.encode(), new.encode(), 1))
    check_refused(generated(example, path, library(), 1, 5, 6), 3, told)


# What it refuses before it loads anything

LINES = f"""q6k-program 1
torch {VERSION}
device cpu
architecture llama
dtype float32
capacity 16
chunk 8
vocabulary 9
constant q6k_0 float32 2x4 weight
constant q6k_0 float32 2x4 other
state float32 1x1x16x4 keys_0
"""


def written(path: Path, content: str = LINES) -> Path:
    """A package without programs."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    with PT2ArchiveWriter(str(path)) as archive:
        archive.write_string("extra/q6k_program", content)
        archive.write_bytes("data/weights/q6k_0", bytes(32))
    return path


@pytest.mark.parametrize(
    ("old", "new", "code", "told"),
    [
        ("q6k-program 1\n", "q6k-program 2\n", 3, "begins with 'q6k-program 2', expected 'q6k-program 1'"),
        ("dtype float32", "dtype float128", 3, "names a dtype 'float128'; known are uint8"),
        ("device cpu", "device tpu", 3, "as line 3 'device tpu', which means nothing"),
        ("device cpu", "device cuda 9", 3, "means nothing"),
        ("device cpu\n", "", 3, "one line of device, found 0"),
        ("chunk 8\n", "chunk 8\nchunk 8\n", 3, "one line of chunk, found 2"),
        ("chunk 8", "chunk 17", 3, "chunks of 17 tokens, more than its capacity of 16"),
        ("capacity 16", "capacity -1", 3, "means nothing"),
        ("capacity 16", "capacity 99999999999", 3, "means nothing"),
        ("vocabulary 9", "vocabulary 0x10", 3, "means nothing"),
        ("keys_0\n", "keys_0", 3, "ends within the line"),
        ("keys_0\n", "weight\n", 3, "names 'weight' twice"),
        ("1x1x16x4 ", "1x1x16x999999999999x999999999999 ", 3, "more than memory can have"),
        ("1x1x16x4 ", "1x1x1x1x1x1x1x16x4 ", 3, "means nothing"),
        ("q6k_0 float32 2x4", "q6k_1 float32 2x4", 3, "no entry data/weights/q6k_1"),
        ("q6k_0 float32 2x4", "q6k_0 float32 2x5", 3, "q6k_0 has 32 bytes, 'weight' of that entry takes 40"),
        ("q6k_0 float32 2x4", "q6k_0 float32 4x2", 3, "'weight' and 'other' of entry q6k_0 different dtypes or"),
        ("constant q6k_0", "constant ../q6k_0", 3, "means nothing"),
        (f"torch {VERSION}", "torch 1.0.0", 6, r"compiled by torch '1\.0\.0', and this is 2\."),
        ("device cpu", "device cuda 3.5", 6, r"compiled for a GPU, and torch sees none|capability 3\.5, GPU 0 has"),
    ],
)
def test_texts_that_are_refused(example: Path, tmp_path: Path, old: str, new: str, code: int, told: str) -> None:
    assert old in LINES
    path = written(tmp_path / "model.pt2", LINES.replace(old, new, 1))
    check_refused(generated(example, path, "none.so", 1, 5), code, told)


def test_files_that_are_refused(example: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "model.pt2")
    whole = path.read_bytes()

    def refused(code: int, told: str, content: bytes | None = None) -> None:
        if content is not None:
            path.write_bytes(content)
        check_refused(generated(example, path, "none.so", 1, 5), code, told)

    refused(3, "not a PT2 archive, or a damaged one", whole[: len(whole) // 2])
    refused(3, "found an empty one", b"")
    # The weights' header says that they begin 65535 bytes later.
    at = whole.index(b"data/weights/q6k_0") - len("model/") - 30
    assert whole[at : at + 4] == b"PK\3\4"
    refused(
        3, r"q6k_0 should be 32 bytes at 6\d{4}, in a file of", whole[: at + 28] + b"\xff\xff" + whole[at + 30 :]
    )
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "packed.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if "weights" in name else zipfile.ZIP_STORED)
    refused(3, "q6k_0 is compressed", (tmp_path / "packed.pt2").read_bytes())
    written(path, LINES + "#" * (1 << 24))
    refused(3, "has 16777[0-9]* bytes, at most 16777216 are read")
    path.unlink()
    refused(4, "cannot be read: No such file or directory")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), r"expected MODEL\.pt2 LIBRARY COUNT ID\.\.\., found 1 argument"),
        (("none.so", "x", "1"), "COUNT: expected a whole number, found 'x'"),
        (("none.so", "0", "1"), "COUNT: expected 1 or more, found 0"),
        (("none.so", "1", "9"), "the model has tokens 0 to 8, found 9"),
        (("none.so", "1", "-1"), "the model has tokens 0 to 8, found -1"),
        (("none.so", "1", "1" * 30), "ID: expected a whole number"),
        (("none.so", "15", "1", "2", "3"), "3 ids and 15 new ones do not fit in the model's 16 positions"),
        (("none.so", "1", *["1"] * 17), "17 ids and 1 new ones do not fit"),
        (("none.so", "1", "1", "--fast"), "expected --verbose or --help, found '--fast'"),
    ],
)
def test_usage(example: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    check_refused(generated(example, written(tmp_path / "model.pt2"), *arguments), 2, told)


def test_help(example: Path) -> None:
    done = generated(example, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {NAME} ")


def test_libraries_that_are_refused(example: Path, tmp_path: Path) -> None:
    path, other = written(tmp_path / "model.pt2"), tmp_path / "none.so"
    # 14 new ones and 3 fit, the last of them needs no place: so it is the library that is missed.
    check_refused(generated(example, path, other, 14, 1, 2, 3), 6, r"none\.so: no such file.*build-ops")
    other.write_text("text")
    check_refused(generated(example, path, other, 1, 1), 6, "does not load: .*build-ops")
    check_refused(
        generated(example, path, TORCH / "lib" / "libc10.so", 1, 1), 6, "not a library of these operations"
    )


def test_a_package_without_programs(example: Path, tmp_path: Path) -> None:
    done = generated(example, written(tmp_path / "model.pt2"), library(), 1, 5)
    check_refused(done, 3, "the program prefill does not load: ")


def test_ids_that_cannot_be_written(example: Path, exported: ExportedModel) -> None:
    with Path("/dev/full").open("w") as full:
        command = [example, exported.package, library(), "1", "5"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (4, "error: the ids cannot be written to stdout.\n")
