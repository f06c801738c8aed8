"""Download a GGUF file of the Hugging Face Hub into the cache, and check it before it is opened.

huggingface_hub does the requests and downloads and keeps the cache. This module plans the download, orders the
steps and handles offline mode. It relies on this part of the documented layout of the cache:

    HF_HUB_CACHE/models--ORG--REPO/refs/REVISION           the commit that the revision was when last fetched
                                   snapshots/COMMIT/FILE   a link to
                                   blobs/HASH              the content
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from q6k_convert import __version__, text
from q6k_convert.errors import EnvironmentMissingError, InputRejectedError, IOFailedError, UsageError
from q6k_convert.hub.answers import guard, in_time, within
from q6k_convert.hub.failures import in_words
from q6k_convert.hub.hashes import Progress, Tell, check, record
from q6k_convert.hub.names import COMMIT, SHOWN_FILES, HubFile, Reference, listing, parse, selected

if TYPE_CHECKING:
    from tqdm import tqdm

_OLDEST_PACKAGE = (1, 31)


@dataclass(frozen=True)
class Source:
    """A GGUF to open.

    Attributes:
        path: path of the file; None if it is not in the cache and `download` is False.
        document: the download, for `--json`; empty if the argument was a path.
    """

    path: Path | None
    document: dict[str, Any] = field(default_factory=dict)


def local_path(source: str, note: Callable[[str], None], progress: Progress) -> Path:
    """Return the path that `resolve` finds, after downloading what is missing."""
    found = resolve(source, note, progress).path
    assert found is not None  # noqa: S101 -- for the type checker
    return found


def fetched_bundle(reference: Reference, note: Callable[[str], None], progress: Progress) -> Path:
    """Return the directory of a published bundle in the cache, after downloading what is missing.

    Raises:
        As `resolve`.
    """
    manifest = _resolved(reference, note, progress, download=True).path
    assert manifest is not None  # noqa: S101 -- for the type checker
    return manifest.parent


def resolve(source: str, note: Callable[[str], None], progress: Progress, *, download: bool = True) -> Source:
    """Return the file that a command's argument names: a path itself, or a reference's file in the cache.

    Args:
        source: a path or a reference.
        note: called with each line about what will be downloaded.
        progress: makes a progress display from a total in bytes and a label.
        download: if False, only say what would be downloaded.

    Raises:
        InputRejectedError: the Hub has no such file or several, denies access, or its answer is malformed.
        IOFailedError: the Hub or the disk fails, or the disk is full; a file's hash is wrong; or offline mode is
            set and the cache lacks the file.
        EnvironmentMissingError: huggingface_hub is not installed, or too old.
        UsageError: HF_TOKEN or HF_ENDPOINT is malformed.
    """
    reference = parse(source)
    return Source(Path(source)) if reference is None else _resolved(reference, note, progress, download=download)


def _resolved(reference: Reference, note: Callable[[str], None], progress: Progress, *, download: bool) -> Source:
    _check_package(reference)
    hub = _Hub(reference)
    with in_words(reference, hub.address, hub.has_token):
        commit, files = hub.files()
        cached = [hub.is_cached(commit, file) for file in files]
        document = hub.plan(commit, files, cached)
        _announce(document, note, "the cache alone" if hub.offline else hub.address)
        missing = document["bytes_to_download"]
        if missing and not download:
            return Source(None, {"download": document})
        _check_room(document)
        with progress(missing, "downloading") if missing else nullcontext(lambda _: None) as tell:
            paths = [hub.fetch(commit, file, tell) for file in files]
    check(files, paths, cached, progress)
    hub.remember(commit)
    return Source(paths[0], {"download": document})


class _Hub:
    """Client of the Hub at HF_ENDPOINT with HF_TOKEN, and of the cache of one repository.

    Attributes:
        address: address of the Hub without user name and password, safe to print.
        has_token: whether HF_TOKEN is set.
        offline: whether HF_HUB_OFFLINE forbids asking the Hub.
    """

    def __init__(self, reference: Reference) -> None:
        from huggingface_hub import HfApi, constants, is_offline_mode, logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # warnings quote addresses
        # Only from the environment: a token stored in a file was not meant for this program.
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and not re.fullmatch(r"[!-~]{1,1000}", token):
            raise UsageError("HF_TOKEN holds characters that no token has", "Set it to the token and nothing else.")
        self.address = _public(constants.ENDPOINT)
        self.offline = is_offline_mode()
        self._reference = reference
        guard(reference)
        self.has_token = bool(token)
        self._timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._api = HfApi(token=token or False, library_name="q6k-convert", library_version=__version__)
        self._cache = Path(constants.HF_HUB_CACHE)
        self._folder = self._cache / f"models--{reference.repository.replace('/', '--')}"
        self._ref = self._folder / "refs" / reference.revision

    def files(self) -> tuple[str, list[HubFile]]:
        """Return the commit that the reference names at present, and its files."""
        reference = self._reference
        if self.offline:
            return self._cached_files()
        try:
            info = within(
                reference,
                self.address,
                lambda: self._api.model_info(
                    reference.repository, revision=reference.revision, files_metadata=True, timeout=self._timeout
                ),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise reference.malformed("it does not describe a repository") from None
        commit, listed = listing(reference, info)
        return commit, selected(reference, listed)

    def _cached_files(self) -> tuple[str, list[HubFile]]:
        """Return the commit that the revision was when last fetched, and its files that are in the cache."""
        reference = self._reference
        known = self._ref.read_text(errors="replace") if self._ref.is_file() else reference.revision
        commit = known if COMMIT.fullmatch(known) else ""
        snapshot = self._folder / "snapshots" / commit
        paths = sorted(path for path in snapshot.rglob("*") if path.is_file()) if commit else []
        files = [
            HubFile(
                path.relative_to(snapshot).as_posix(),
                path.stat().st_size,
                path.readlink().name if path.is_symlink() else "",
            )
            for path in paths
            if reference.wants(path.relative_to(snapshot).as_posix())
        ]
        try:
            return commit, selected(self._reference, files)
        except InputRejectedError as error:
            missing = f"the Hub may not be asked (HF_HUB_OFFLINE), and the cache {self._folder} does not have it"
            raise self._reference.absent(
                IOFailedError,
                missing + (f": {error.cause.removeprefix(self._reference.where)}" if files else ""),
                "Run once without HF_HUB_OFFLINE, or point HF_HOME to the cache that has it.",
            ) from None

    def is_cached(self, commit: str, file: HubFile) -> bool:
        """Check whether a file is in the cache."""
        found = within(
            self._reference,
            self.address,
            lambda: self._api.hf_hub_download(self._reference.repository, file.name, revision=commit, dry_run=True),
        )
        if found.commit_hash != commit:
            raise self._reference.malformed(f"{file.name} is not of commit {commit}")
        return found.is_cached

    def fetch(self, commit: str, file: HubFile, tell: Tell) -> Path:
        """Return a file's path in the cache, after downloading it if it is missing. Its hash is not checked."""
        bar = _bar(in_time(file.name, file.size, tell))
        try:
            return Path(
                self._api.hf_hub_download(self._reference.repository, file.name, revision=commit, tqdm_class=bar)
            )
        except ValueError as error:  # over 50 GB, and Xet is disabled or not installed
            raise IOFailedError(
                f"{file.name}: huggingface_hub refuses to download it: {error}",
                "Install hf_xet, and leave HF_HUB_DISABLE_XET unset.",
            ) from None
        except RuntimeError:  # Xet's; its text has addresses
            raise IOFailedError(
                f"{file.name}: Xet could not download it",
                "Run the same command again; HF_HUB_DISABLE_XET=1 downloads over plain HTTP.",
            ) from None

    def remember(self, commit: str) -> None:
        """Record which commit the revision names, for offline mode."""
        if commit != self._reference.revision:
            record(self._ref, commit)

    def plan(self, commit: str, files: Sequence[HubFile], cached: Sequence[bool]) -> dict[str, Any]:
        """Return which files are downloaded and which are in the cache, for `--json`."""
        place = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        there = [file.size if found else 0 for file, found in zip(files, cached, strict=True)]
        total = sum(file.size for file in files)
        return {
            "hub": self.address,
            "repository": self._reference.repository,
            "revision": self._reference.revision,
            "commit": commit,
            "files": [
                {"name": file.name, "bytes": file.size, "bytes_in_cache": size}
                for file, size in zip(files, there, strict=True)
            ],
            "bytes": total,
            "bytes_to_download": total - sum(there),
            "cache": str(self._cache),
            "bytes_free": shutil.disk_usage(place).free,
        }


def _check_package(reference: Reference) -> None:
    """Check that huggingface_hub is installed and recent enough."""
    try:
        found = version("huggingface_hub")
    except PackageNotFoundError:
        found = "none"
    number = re.match(r"(\d+)\.(\d+)", found)
    if number is None or (int(number[1]), int(number[2])) < _OLDEST_PACKAGE:
        oldest = ".".join(map(str, _OLDEST_PACKAGE))
        raise reference.absent(
            EnvironmentMissingError,
            f"for files of the Hub huggingface_hub {oldest} or later is needed, and {found} is installed",
            "Install it: `pip install 'q6k-convert[hub]'`.",
        )


def _public(endpoint: str) -> str:
    """Return the Hub's address without a name and password.

    Raises:
        UsageError: the endpoint is not an address. The message does not repeat it, as it may hold a password.
    """
    try:
        parts = urlsplit(endpoint)
        host = (parts.hostname or "") + (f":{parts.port}" if parts.port else "")
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise UsageError("HF_ENDPOINT is not an address like https://huggingface.co", "Unset or correct it.")
    return f"{parts.scheme}://{host}"


def _announce(document: dict[str, Any], note: Callable[[str], None], where: str) -> None:
    """Say what will be downloaded and what is in the cache."""
    note(f"{document['repository']} at {document['revision']} (commit {document['commit'][:12]}), from {where}")
    for file in document["files"][:SHOWN_FILES]:
        note(f"  {file['name']}, {text.size(file['bytes'])}{', in the cache' if file['bytes_in_cache'] else ''}")
    if (more := len(document["files"]) - SHOWN_FILES) > 0:
        note(f"  and {more} more")
    if missing := document["bytes_to_download"]:
        note(f"{text.size(missing)} to download, {text.size(document['bytes_free'])} free in {document['cache']}")


def _check_room(document: dict[str, Any]) -> None:
    """Check that the download fits on the cache's disk."""
    needed, free = document["bytes_to_download"], document["bytes_free"]
    if needed > free:
        raise IOFailedError(
            f"{document['cache']}: the download takes {text.size(needed)} ({needed} bytes), "
            f"{text.size(free)} are free",
            "Free some space, or name a cache on another disk with HF_HUB_CACHE.",
        )


def _bar(tell: Tell) -> type[tqdm[Any]]:
    """Return a class of progress bars for huggingface_hub that draw nothing and pass the bytes to `tell`."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            tell(int(n or 0))  # bytes of the file; negative when a server makes it start again

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore the bytes that Xet transfers: fewer than the file's where it has parts already."""

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            pass

    return Bar
