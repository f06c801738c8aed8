"""A GGUF file of the Hugging Face Hub by its name, brought into the cache before it is opened.

What a name means is in `hub_names.py`, what the Hub is asked in `hub_client.py`, where files go in
`hub_cache.py`; here are the order of things, the plan, and the errors in words.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import EnvironmentMissingError, InputRejectedError, IOFailedError, Q6KConvertError
from q6k_convert.hub.names import SHOWN_FILES, HubFile, Reference, listing, parse, selected

if TYPE_CHECKING:
    from q6k_convert.hub.cache import Cache
    from q6k_convert.hub.client import Client

__all__ = ["Source", "local_path", "parse", "resolve"]

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]

_OLDEST_PACKAGE = 1
_MAX_DOWNLOAD = 50_000_000_000  # what the Hub serves of a file over plain HTTP


@dataclass(frozen=True)
class Source:
    """A GGUF to open.

    Attributes:
        path: where it is, or None if it would have had to be downloaded and that was not wanted.
        document: for `--json`: what is downloaded; empty for a file that was no reference.
    """

    path: Path | None
    document: dict[str, Any] = field(default_factory=dict)


def local_path(source: str, note: Callable[[str], None], progress: Progress) -> Path:
    """`resolve`, with whatever is missing downloaded."""
    found = resolve(source, note, progress).path
    assert found is not None  # noqa: S101 -- for the type checker
    return found


def resolve(source: str, note: Callable[[str], None], progress: Progress, *, download: bool = True) -> Source:
    """The file that a command's argument stands for: itself, or what it refers to, brought into the cache.

    Args:
        source: a path or a reference.
        note: told, line by line, what will be downloaded.
        progress: makes a progress display from a total in bytes and a word for what is done.
        download: if False, say what would be downloaded and do not.

    Raises:
        InputRejectedError: the Hub has no such file, keeps it from us, has several, or says what cannot be.
        IOFailedError: the Hub or the disk fails, or is full; or it may not be asked and the cache lacks it.
        EnvironmentMissingError: huggingface_hub is not installed.
    """
    reference = parse(source)
    if reference is None:
        return Source(Path(source))
    _check_package(reference)
    from huggingface_hub import constants

    from q6k_convert.hub.cache import Cache
    from q6k_convert.hub.client import Client

    cache = Cache(reference.repository)
    if constants.is_offline_mode():
        return _cached(reference, cache, note)
    client = Client()
    with _explained(reference, client):
        commit, listed = listing(reference, client.listing(reference.repository, reference.revision))
        files = selected(reference, listed)
        document = _planned(reference, cache, commit, files, client.base)
        _announce(reference, document, note, client.base)
        missing = document["bytes_to_download"]
        result = Source(cache.path(commit, files[0].name), {"download": document})
        if missing and not download:
            return Source(None, result.document)
        if missing:
            _check_room(reference, cache, files, document)
        with progress(missing, "downloading") if missing else nullcontext(lambda _: None) as tell:
            for file in files:
                cache.fetch(client, commit, file, tell)
        cache.remember(reference.revision, commit)
    return result


def _check_package(reference: Reference) -> None:
    try:
        found = version("huggingface_hub")
    except PackageNotFoundError:
        found = "none"
    if not found.partition(".")[0].isdecimal() or int(found.partition(".")[0]) < _OLDEST_PACKAGE:
        raise reference.absent(
            EnvironmentMissingError,
            f"for files of the Hub huggingface_hub {_OLDEST_PACKAGE} or later is needed, and {found} is installed",
            "Install it: `pip install 'q6k-convert[hub]'`.",
        )


def _cached(reference: Reference, cache: Cache, note: Callable[[str], None]) -> Source:
    """What the cache has, for the Hub may not be asked."""
    from q6k_convert.hub.client import public_address

    commit = cache.commit(reference.revision)
    missing = f"the Hub may not be asked (HF_HUB_OFFLINE), and the cache {cache.folder} does not have it"
    files = cache.files(commit) if commit else []
    try:
        chosen = selected(reference, files)
    except InputRejectedError as error:
        raise reference.absent(
            IOFailedError,
            missing + (f": {error.cause.removeprefix(reference.where)}" if files else ""),
            "Run once without HF_HUB_OFFLINE, or point HF_HOME to the cache that has it.",
        ) from None
    assert commit is not None  # noqa: S101 -- or there would be no files
    document = _planned(reference, cache, commit, chosen, public_address())
    _announce(reference, document, note, "the cache alone")
    return Source(cache.path(commit, chosen[0].name), {"download": document})


def _planned(reference: Reference, cache: Cache, commit: str, files: Sequence[HubFile], hub: str) -> dict[str, Any]:
    """What is downloaded and what is there already, for `--json`."""
    present = [cache.present(commit, file) for file in files]
    place = next(path for path in (cache.folder, *cache.folder.absolute().parents) if path.exists())
    return {
        "hub": hub,
        "repository": reference.repository,
        "revision": reference.revision,
        "commit": commit,
        "files": [
            {"name": file.name, "bytes": file.size, "bytes_in_cache": there}
            for file, there in zip(files, present, strict=True)
        ],
        "bytes": sum(file.size for file in files),
        "bytes_to_download": sum(file.size for file in files) - sum(present),
        "cache": str(cache.root),
        "bytes_free": shutil.disk_usage(place).free,
    }


def _check_room(reference: Reference, cache: Cache, files: Sequence[HubFile], document: dict[str, Any]) -> None:
    """Raises unless the download can be had and fits on the cache's disk."""
    for file, row in zip(files, document["files"], strict=True):
        if file.size > _MAX_DOWNLOAD and row["bytes_in_cache"] < file.size:
            raise reference.reject(
                f"{file.name} has {text.size(file.size)}; over HTTP it serves up to {text.size(_MAX_DOWNLOAD)}",
                f"Run `hf download {reference.repository} {shlex.quote(file.name)}`, then this again.",
            )
    needed, free = document["bytes_to_download"], document["bytes_free"]
    if needed > free:
        raise IOFailedError(
            f"{cache.root}: the download takes {text.size(needed)} ({needed} bytes), {text.size(free)} are free",
            "Free some space, or name a cache on another disk with HF_HUB_CACHE.",
        )


def _announce(reference: Reference, document: dict[str, Any], note: Callable[[str], None], where: str) -> None:
    note(f"{reference.repository} at {reference.revision} (commit {document['commit'][:12]}), from {where}")
    for file in document["files"][:SHOWN_FILES]:
        there = file["bytes_in_cache"]
        cached = f", {text.size(there)} of it in the cache" if there < file["bytes"] else ", in the cache"
        note(f"  {file['name']}, {text.size(file['bytes'])}{cached if there else ''}")
    if (more := len(document["files"]) - SHOWN_FILES) > 0:
        note(f"  and {more} more")
    if missing := document["bytes_to_download"]:
        note(f"{text.size(missing)} to download, {text.size(document['bytes_free'])} free in {document['cache']}")


@contextmanager
def _explained(reference: Reference, client: Client) -> Iterator[None]:
    """Turns what the Hub refuses, or fails to do, into one of this program's errors."""
    from q6k_convert.hub.client import RefusedError, UnreachableError

    try:
        yield
    except UnreachableError as error:
        raise reference.absent(
            IOFailedError,
            f"{client.base} does not answer as it should: {error}",
            "Run the same command again: it goes on where it was; HF_HUB_OFFLINE=1 uses what the cache has.",
        ) from None
    except RefusedError as error:
        raise _refusal(reference, client, error.status, error.code) from None


def _refusal(reference: Reference, client: Client, status: int, code: str) -> Q6KConvertError:
    page = f"{client.base}/{reference.repository}"
    token = "the account of HF_TOKEN may not see it" if client.has_token else "it takes an HF_TOKEN to see it"
    if code == "GatedRepo":
        has = "HF_TOKEN is of an account without access" if client.has_token else "no HF_TOKEN is set"
        return reference.reject(
            f"{reference.repository} is gated: its terms have to be accepted, and {has}",
            f"Accept them at {page}, and set HF_TOKEN to a token of that account.",
        )
    if code == "RevisionNotFound":
        return reference.reject(
            f"{reference.repository} has no revision {reference.revision!r}", f"Look at {page}/tree/main."
        )
    if code == "EntryNotFound":
        return reference.reject("a file that it lists is not there", "Run again; name a commit if it stays so.")
    if status in (401, 404):
        problem = f"{client.base} has no repository {reference.repository}, or {token}"
        remedy = f"Check the name at {page}; if it is private, set HF_TOKEN to a token that may read it."
        if reference.certain:
            return reference.reject(problem, remedy)
        return reference.absent(IOFailedError, problem, remedy)
    if status in (403, 451):
        return reference.reject(
            f"{reference.repository} is closed to us (HTTP status {status})", f"Look at {page}."
        )
    return IOFailedError(
        f"{reference.text}: {client.base} answers with HTTP status {status}", "Run the same command again later."
    )
