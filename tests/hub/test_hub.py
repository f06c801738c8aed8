"""Files of the Hub by name: found, fetched, taken from the cache; the bundle is that of the file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from bundle_helpers import failed, invoke, listing, run_cli
from gguf_builder import Builder, key_value, small_model
from hub_server import FakeHub, environment, fresh
from q6k_convert import text
from q6k_convert.cli import streams
from q6k_convert.hub import local_path

MODEL = small_model().build()
NAME = "tiny-Q6_K.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        yield served


def split(parts: int = 3) -> dict[str, bytes]:
    """A model in parts, each of which is larger than what is kept in git."""
    builder, files = small_model(), {}
    for number in range(parts):
        keys = [
            *(builder.kv if number == 0 else []),
            key_value("split.no", number, "u16"),
            key_value("split.count", parts, "u16"),
            key_value("split.tensors.count", len(builder.tensors), "i32"),
        ]
        own = builder.tensors[number * 3 : number * 3 + 3 if number < parts - 1 else None]
        files[f"tiny-Q4_K_M-{number + 1:05}-of-{parts:05}.gguf"] = Builder(own, keys).build()
    return files


REPOSITORY = {
    "README.md": b"# tiny",
    NAME: MODEL,
    "tiny-Q6_K_L.gguf": small_model().build() + bytes(32),
    "mmproj-Q6_K.gguf": bytes(2000),
    "BF16/tiny.gguf": bytes(2000),
} | {f"parts/{name}": content for name, content in split().items()}


def bundle_of(files: dict[str, bytes], directory: Path) -> dict[str, object]:
    """What converting these very files, on the disk, gives."""
    directory.mkdir()
    for name, content in files.items():
        (directory / Path(name).name).write_bytes(content)
    assert invoke(directory / Path(next(iter(files))).name, directory / "out").exit_code == 0
    return dict(listing(directory / "out"))


def no_progress(total: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
    """A progress display that shows nothing."""
    return nullcontext(lambda count: None)


def progress(said: str, what: str) -> list[str]:
    """The lines of a progress display."""
    return [line.removeprefix(f"{what}: ") for line in said.splitlines() if line.startswith(f"{what}: ")]


# What is meant


@pytest.mark.parametrize(
    "reference",
    [
        "org/tiny:Q6_K", "org/tiny:q6_k", "org/tiny@main:Q6_K", "org/tiny@v1.0:Q6_K", "org/tiny@refs/pr/3:Q6_K",
        f"org/tiny/{NAME}", f"org/tiny@v1.0/{NAME}", f"org/tiny@refs/pr/3/{NAME}",
    ],
)  # fmt: skip
def test_a_reference_gives_the_file(reference: str, hub: FakeHub) -> None:
    meant = next((revision for revision in ("v1.0", "refs/pr/3") if revision in reference), "main")
    other = REPOSITORY | {NAME: MODEL.replace(b"llama", b"mamba")}
    for revision in ("main", "v1.0", "refs/pr/3"):
        hub.add("org/tiny", REPOSITORY if revision == meant else other, revision)
    assert local_path(reference, print, no_progress).read_bytes() == MODEL
    assert len(hub.contents()) == 1


@pytest.mark.parametrize(
    "reference", ["org/tiny:Q4_K_M", *(f"org/tiny/parts/tiny-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 3))]
)
def test_all_parts_of_a_split_model_are_fetched(reference: str, hub: FakeHub) -> None:
    hub.add("org/tiny", REPOSITORY)
    first = local_path(reference, print, no_progress)
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == split()
    assert first.name == min(split())
    assert len(hub.contents()) == 3


@pytest.mark.parametrize(("reference", "files"), [("org/tiny:Q6_K", {NAME: MODEL}), ("org/tiny:Q4_K_M", split())])
def test_the_bundle_is_that_of_the_files(
    reference: str, files: dict[str, bytes], hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("org/tiny", REPOSITORY)
    result = invoke(reference, "out")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path / "out") == bundle_of(files, tmp_path / "local")


def test_files_kept_in_git_itself_are_fetched_too(hub: FakeHub) -> None:
    tiny = {"x.Q6_K.gguf": Builder(small_model().tensors[2:3]).build()}
    assert len(tiny["x.Q6_K.gguf"]) < 1000
    hub.add("org/tiny", tiny)
    assert local_path("org/tiny:Q6_K", print, no_progress).read_bytes() == tiny["x.Q6_K.gguf"]


def test_inspect_and_verify_take_references(hub: FakeHub) -> None:
    hub.add("org/tiny", REPOSITORY)
    assert "GGUF version 3" in invoke("inspect", "org/tiny:Q6_K").stdout
    assert invoke("inspect", f"org/tiny/{NAME}", "--key", "llama.block_count").stdout == "1\n"
    converted = invoke("org/tiny:Q6_K", "out")
    assert "verify out --source org/tiny:Q6_K" in " ".join(converted.stdout.split())
    document = json.loads(invoke("verify", "out", "--source", "org/tiny:Q6_K", "--json").stdout)
    assert {stage["stage"]: stage["state"] for stage in document["stages"]}["source"] == "passed"
    assert len(hub.contents()) == 1


# Interruptions


@pytest.mark.parametrize("with_ranges", [True, False])
def test_a_connection_that_breaks_is_resumed(
    with_ranges: bool, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("org/tiny", REPOSITORY)
    hub.ranges = with_ranges
    hub.failures = [("cut", 3000), ("status", 429)]
    result = invoke("org/tiny:Q6_K", "out")
    assert result.exit_code == 0, result.output
    assert [asked.headers.get("range") for asked in hub.contents()] == [None, "bytes=3000-", "bytes=3000-"]
    assert progress(result.stderr, "downloading")[-1].startswith("7.84 kB of 7.84 kB (100%)")
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")


def test_an_interrupted_run_ends_at_once_and_leaves_no_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.failures = [("stall", 3000)]
    command = [sys.executable, "-m", "q6k_convert", "org/tiny:Q6_K", "out"]
    process = subprocess.Popen(command, env=environment(tmp_path, hub), stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(30)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == 130, said
    assert "error: interrupted (SIGINT)" in said
    assert not (tmp_path / "out").exists()
    blobs = tmp_path / "home" / "hub" / "models--org--tiny" / "blobs"
    assert list(blobs.iterdir()) == []
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")


# The cache


def test_what_is_cached_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    for out in ("one", "two"):
        assert invoke("org/tiny:Q6_K", out).exit_code == 0
    assert len(hub.contents()) == 1
    # The branch moves on; the file is the same.
    hub.add("org/tiny", REPOSITORY | {"README.md": b"# new"})
    assert invoke("org/tiny:Q6_K", "three").exit_code == 0
    assert len(hub.contents()) == 1
    hub.add("org/tiny", REPOSITORY | {NAME: MODEL + bytes(32)})
    assert invoke("org/tiny:Q6_K", "four").exit_code == 0
    assert len(hub.contents()) == 2
    bundles = {name: listing(tmp_path / name) for name in ("one", "two", "three", "four")}
    assert bundles["one"] == bundles["two"] == bundles["three"] != bundles["four"]


def test_the_cache_is_the_one_of_huggingface_hub(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    ours = try_to_load_from_cache("org/tiny", NAME, cache_dir=tmp_path / "home" / "hub")
    assert isinstance(ours, str)
    assert Path(ours).read_bytes() == MODEL
    theirs = hf_hub_download(
        "org/tiny", "tiny-Q6_K_L.gguf", cache_dir=tmp_path / "home" / "hub", endpoint=hub.endpoint
    )
    assert Path(theirs).parent == Path(ours).parent
    before = len(hub.contents())
    assert invoke("org/tiny:Q6_K_L", "more").exit_code == 0
    assert len(hub.contents()) == before


def test_the_environment_says_where_and_whether_to_ask(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        asked = len(hub.asked)
        done = run_cli("inspect", "org/tiny:Q6_K", env=environment(tmp_path, hub, **more), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (len(hub.asked) == asked) == bool(more)
        assert ("from the cache alone" in done.stderr) == bool(more)


def test_offline_the_cache_is_all_there_is(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lacks = "org/tiny:Q6_K: the Hub may not be asked (HF_HUB_OFFLINE), and the cache"
    failed(invoke("org/tiny:Q6_K", "one"), 4, lacks, "Run once without HF_HUB_OFFLINE")
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert invoke("org/tiny:Q6_K", "one").exit_code == 0
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = hub.repositories["org/tiny"].commits["main"]
    for out, reference in {"two": "org/tiny:Q6_K", "three": f"org/tiny@{commit}/{NAME}"}.items():
        done = invoke(reference, out)
        assert done.exit_code == 0, done.stderr
        assert "from the cache alone" in done.stderr
        assert listing(tmp_path / out) == listing(tmp_path / "one")
    other = "does not have it: no file of this quantisation; there are: Q6_K"
    failed(invoke("org/tiny:Q4_K_M", "four"), 4, other, "Run once without HF_HUB_OFFLINE")
    assert len(hub.asked) == asked


# What is said


def test_the_plan_is_in_the_document(hub: FakeHub) -> None:
    hub.add("org/tiny", REPOSITORY)
    planned = invoke("org/tiny:Q4_K_M", "out", "--dry-run", "--json")
    document = json.loads(planned.stdout)
    assert set(document) == {"status", "download"}
    download = document["download"]
    sizes = {f"parts/{name}": len(content) for name, content in split().items()}
    assert {file["name"]: file["bytes"] for file in download["files"]} == sizes
    assert download["bytes"] == download["bytes_to_download"] == sum(sizes.values())
    assert (download["repository"], download["revision"]) == ("org/tiny", "main")
    assert download["commit"] == hub.repositories["org/tiny"].commits["main"]
    assert download["bytes_free"] > 0
    assert f"{text.size(sum(sizes.values()))} to download, " in planned.stderr
    assert hub.contents() == []
    done = json.loads(invoke("org/tiny:Q4_K_M", "out", "--json").stdout)
    assert done["status"] == "done"
    assert done["download"] == download | {"bytes_free": done["download"]["bytes_free"]}
    again = invoke("org/tiny:Q4_K_M", "new", "--dry-run", "--json")
    assert again.stderr.count(", in the cache") == len(sizes)
    assert json.loads(again.stdout)["download"]["bytes_to_download"] == 0
    assert json.loads(again.stdout)["plan"]["tensors"] == 7


def test_quiet_says_nothing_and_progress_is_in_bytes(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", REPOSITORY)
    assert invoke("org/tiny:Q6_K", "out", "--quiet").output == ""
    monkeypatch.setattr(streams, "LINE_SECONDS", 0.0)
    result = invoke("org/tiny:Q6_K_L", "more")
    for what in ("downloading", "checking"):
        assert progress(result.stderr, what)[-1].startswith("7.87 kB of 7.87 kB (100%)")
