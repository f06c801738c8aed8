"""Files of the Hub by name: found, fetched, gone on with, taken from the cache; the bundle is that of the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from bundle_helpers import failed, invoke, listing, run_cli
from gguf_builder import Builder, key_value, small_model
from hub_server import FakeHub, fresh
from q6k_convert.cli import terminal
from q6k_convert.hub import cache

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


def ranges(hub: FakeHub) -> list[str | None]:
    return [asked.headers.get("range") for asked in hub.contents()]


# What is meant


@pytest.mark.parametrize(
    "reference",
    [
        "org/tiny:Q6_K", "org/tiny:q6_k", "org/tiny@main:Q6_K", "org/tiny@v1.0:Q6_K", "org/tiny@refs/pr/3:Q6_K",
        f"org/tiny/{NAME}", f"org/tiny@v1.0/{NAME}", f"org/tiny@refs/pr/3/{NAME}",
    ],
)  # fmt: skip
def test_a_reference_gives_the_bundle_of_the_file(reference: str, hub: FakeHub, tmp_path: Path) -> None:
    meant = next((revision for revision in ("v1.0", "refs/pr/3") if revision in reference), "main")
    other = REPOSITORY | {NAME: MODEL.replace(b"llama", b"mamba")}
    for revision in ("main", "v1.0", "refs/pr/3"):
        hub.add("org/tiny", REPOSITORY if revision == meant else other, revision)
    result = invoke(reference, "out")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")
    assert len(hub.contents()) == 1


@pytest.mark.parametrize(
    "reference", ["org/tiny:Q4_K_M", *(f"org/tiny/parts/tiny-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 3))]
)
def test_all_parts_of_a_split_model_are_fetched(reference: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    result = invoke(reference, "out")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path / "out") == bundle_of(split(), tmp_path / "local")
    assert len(hub.contents()) == 3


def test_files_kept_in_git_itself_are_fetched_too(hub: FakeHub, tmp_path: Path) -> None:
    tiny = {"x.Q6_K.gguf": Builder(small_model().tensors[2:3]).build()}
    assert len(tiny["x.Q6_K.gguf"]) < 1000
    hub.add("org/tiny", tiny)
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert listing(tmp_path / "out") == bundle_of(tiny, tmp_path / "local")


def test_inspect_and_verify_take_references(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    assert "GGUF version 3" in invoke("inspect", "org/tiny:Q6_K").stdout
    assert invoke("inspect", f"org/tiny/{NAME}", "--key", "llama.block_count").stdout == "1\n"
    converted = invoke("org/tiny:Q6_K", "out")
    assert "verify out --source org/tiny:Q6_K" in " ".join(converted.stdout.split())
    document = json.loads(run_in(tmp_path, hub, "verify", "out", "--source", "org/tiny:Q6_K", "--json").stdout)
    assert {stage["stage"]: stage["state"] for stage in document["stages"]}["source"] == "passed"
    assert len(hub.contents()) == 1


def run_in(tmp_path: Path, hub: FakeHub, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that knows the hub from its environment only."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")} | more
    return run_cli(*args, env=environment, cwd=tmp_path)


# Going on


def test_a_connection_that_breaks_is_gone_on_with(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.failures = [("cut", 3000), ("cut", 0), ("cut", 1000), ("status", 503), ("status", 429)]
    result = invoke("org/tiny:Q6_K", "out")
    assert result.exit_code == 0, result.output
    assert ranges(hub) == [None, "bytes=3000-", "bytes=3000-", *["bytes=4000-"] * 3]
    assert {asked.headers["accept-encoding"] for asked in hub.asked} == {"identity"}
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")


def test_breaking_often_is_no_failure_while_it_gets_on(hub: FakeHub) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.failures = [("cut", 500)] * 16
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert ranges(hub) == [None, *(f"bytes={at}-" for at in range(500, 8001, 500))]


def test_the_next_run_goes_on_where_this_one_failed(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.failures = [("cut", 3000), *[("cut", 0)] * 5]
    failed(invoke("org/tiny:Q6_K", "out"), 4, "the connection broke off", "it goes on where it was")
    assert not (tmp_path / "out").exists()
    asked = len(hub.contents())
    planned = invoke("org/tiny:Q6_K", "out", "--dry-run")
    assert f"{NAME}, 8.48 kB, 3.00 kB of it in the cache" in planned.stderr
    assert "5.48 kB to download" in planned.stderr
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert ranges(hub)[asked:] == ["bytes=3000-"]
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")
    assert not list((tmp_path / "home" / "hub").rglob("*incomplete*"))


def test_an_interrupted_run_keeps_what_has_come(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.failures = [("stall", 3000)]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "q6k_convert", "org/tiny:Q6_K", "out"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(30)

    def received() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "home").rglob("*.q6k.incomplete"))

    while received() < 3000 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "error: interrupted (SIGINT)" in said
    assert (received(), (tmp_path / "out").exists()) == (3000, False)
    done = run_in(tmp_path, hub, "org/tiny:Q6_K", "out")
    assert done.returncode == 0, done.stderr
    assert ranges(hub) == [None, "bytes=3000-"]
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")


def test_a_silent_connection_is_given_up_and_gone_on_with(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add("org/tiny", REPOSITORY)
    hub.failures = [("stall", 3000)]
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert ranges(hub) == [None, "bytes=3000-"]
    monkeypatch.setattr(cache, "_RETRIES", 0)
    hub.failures = [("stall", 100)]
    failed(invoke("org/tiny:Q6_K_L", "more"), 4, "nothing came for 0.2 s", "Run the same command again")


def test_a_server_without_ranges_is_read_from_the_beginning(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.ranges = False
    hub.failures = [("cut", 3000)]
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert ranges(hub) == [None, "bytes=3000-"]
    assert listing(tmp_path / "out") == bundle_of({NAME: MODEL}, tmp_path / "local")


def test_a_server_that_gets_nowhere_is_given_up(hub: FakeHub) -> None:
    hub.add("org/tiny", REPOSITORY)
    hub.ranges = False
    hub.failures = [("cut", 5000), ("cut", 3000)] * 20
    failed(invoke("org/tiny:Q6_K", "out"), 4, "the connection broke off", "Run the same command again")
    assert len(hub.contents()) == 6
    hub.ranges, hub.shift, hub.failures = True, 1, []
    failed(invoke("org/tiny:Q6_K", "out"), 4, "another part came than was asked for", "Run the same command again")


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


def test_offline_the_cache_is_all_there_is(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    offline = {"HF_HUB_OFFLINE": "1"}
    empty = run_in(tmp_path, hub, "org/tiny:Q6_K", "one", **offline)
    assert empty.returncode == 4
    assert "error: org/tiny:Q6_K: the Hub may not be asked (HF_HUB_OFFLINE), and the cache" in empty.stderr
    assert hub.asked == []
    assert run_in(tmp_path, hub, "org/tiny:Q6_K", "one").returncode == 0
    asked = len(hub.asked)
    commit = hub.repositories["org/tiny"].commits["main"]
    for out, reference in {"two": "org/tiny:Q6_K", "three": f"org/tiny@{commit}/{NAME}"}.items():
        done = run_in(tmp_path, hub, reference, out, **offline)
        assert done.returncode == 0, done.stderr
        assert "from the cache alone" in done.stderr
        assert listing(tmp_path / out) == listing(tmp_path / "one")
    other = run_in(tmp_path, hub, "org/tiny:Q4_K_M", "four", **offline)
    assert other.returncode == 4
    assert "does not have it: no file of this quantisation; there are: Q6_K" in other.stderr
    assert len(hub.asked) == asked


# What is said


def test_the_plan_is_in_the_document(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", REPOSITORY)
    document = json.loads(run_in(tmp_path, hub, "org/tiny:Q4_K_M", "out", "--dry-run", "--json").stdout)
    assert set(document) == {"status", "download"}
    download = document["download"]
    sizes = {f"parts/{name}": len(content) for name, content in split().items()}
    assert {file["name"]: file["bytes"] for file in download["files"]} == sizes
    assert download["bytes"] == download["bytes_to_download"] == sum(sizes.values())
    assert (download["repository"], download["revision"]) == ("org/tiny", "main")
    assert download["commit"] == hub.repositories["org/tiny"].commits["main"]
    assert download["bytes_free"] > 0
    assert hub.contents() == []
    done = json.loads(run_in(tmp_path, hub, "org/tiny:Q4_K_M", "out", "--json").stdout)
    assert done["status"] == "done"
    assert done["download"] == download | {"bytes_free": done["download"]["bytes_free"]}
    again = json.loads(run_in(tmp_path, hub, "org/tiny:Q4_K_M", "new", "--dry-run", "--json").stdout)
    assert again["download"]["bytes_to_download"] == 0
    assert again["plan"]["tensors"] == 7


def test_quiet_says_nothing_and_progress_is_in_bytes(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", REPOSITORY)
    assert invoke("org/tiny:Q6_K", "out", "--quiet").output == ""
    monkeypatch.setattr(terminal, "_LINE_SECONDS", 0.0)
    result = invoke("org/tiny:Q6_K_L", "more")
    lines = [line for line in result.stderr.splitlines() if line.startswith("downloading: ")]
    assert lines[-1].startswith("downloading: 8.51 kB of 8.51 kB (100%)")
