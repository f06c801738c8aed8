"""The cache of the Hugging Face Hub that all of its tools share on a machine.

    CACHE/models--ORG--REPO/refs/REVISION             the commit that it was when last asked for
                            snapshots/COMMIT/FILE     a link to
                            blobs/HASH                the file's content, named by its hash

huggingface_hub's own download drops a file cut short with its process, and checks no hash; here what has come
stays, the next run goes on from there, and content is what the Hub's listing said, or it is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from q6k_convert.errors import IOFailedError
from q6k_convert.hub.client import Client, UnreachableError, patiently
from q6k_convert.hub.names import HubFile

_PIECE = 1 << 20
_RETRIES = 5  # in a row, without a byte of progress


class Cache:
    """A repository's place in the cache."""

    def __init__(self, repository: str) -> None:
        from huggingface_hub import constants

        self.root = Path(constants.HF_HUB_CACHE)
        self.repository = repository
        self.folder = self.root / f"models--{repository.replace('/', '--')}"

    def commit(self, revision: str) -> str | None:
        """The commit a revision was when it was last asked for, if the cache knows."""
        try:
            with (self.folder / "refs" / revision).open("rb") as file:
                commit = file.read(41).decode("ascii", "replace")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            commit = revision
        return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None

    def files(self, commit: str) -> list[HubFile]:
        """The GGUF files that it has of a commit."""
        snapshot = self.folder / "snapshots" / commit
        found = (path for path in sorted(snapshot.rglob("*.gguf")) if path.is_file())
        return [HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in found]

    def path(self, commit: str, name: str) -> Path:
        """Where a file is, once it is there."""
        return self.folder / "snapshots" / commit / name

    def present(self, commit: str, file: HubFile) -> int:
        """Bytes of a file that are there already.

        Raises:
            IOFailedError: the whole file is there, and is not of the size that the Hub states.
        """
        for whole in (self.path(commit, file.name), self._blob(file)):
            if whole.is_file():
                if (found := whole.stat().st_size) != file.size:
                    raise IOFailedError(
                        f"{whole} has {found} bytes, and {file.name} has {file.size} on the Hub",
                        "The cache is damaged: remove that file and run again.",
                    )
                return file.size
        partial = self._partial(file)
        return min(partial.stat().st_size, file.size) if partial.is_file() else 0

    def fetch(self, client: Client, commit: str, file: HubFile, tell: Callable[[int], None]) -> None:
        """Brings a file into the cache, going on where an earlier run was cut short.

        Args:
            client: the Hub to ask.
            commit: of the repository.
            file: as the Hub lists it.
            tell: told of bytes newly received.

        Raises:
            RefusedError, UnreachableError: as the client does; what has come stays.
            IOFailedError: another run is at it, or what came is not what the listing says.
            OSError: it cannot be written.
        """
        pointer, blob = self.path(commit, file.name), self._blob(file)
        if not pointer.is_file():
            if not blob.is_file():
                blob.parent.mkdir(parents=True, exist_ok=True)
                self._download(client, commit, file, tell)
            pointer.parent.mkdir(parents=True, exist_ok=True)
            link = pointer.with_name(f".q6k.{os.getpid()}")
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, pointer.parent))
            link.replace(pointer)

    def remember(self, revision: str, commit: str) -> None:
        """Notes which commit a revision is, for when the Hub may not be asked."""
        if revision != commit and self.commit(revision) != commit:
            ref = self.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            new.write_text(commit)
            new.replace(ref)

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / (file.digest or "-")

    def _partial(self, file: HubFile) -> Path:
        return self._blob(file).with_suffix(".q6k.incomplete")

    def _download(self, client: Client, commit: str, file: HubFile, tell: Callable[[int], None]) -> None:
        path = self._partial(file)
        with os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b"
        ) as partial:
            _lock(partial, path)
            received = _Received(partial, file)
            told = received.at

            def more() -> None:
                nonlocal told
                with client.content(self.repository, commit, file.name, received.at) as (start, chunks):
                    if start != received.at:
                        received.restart()
                    for chunk in chunks:
                        received.add(chunk)
                        tell(max(0, received.at - told))
                        told = max(told, received.at)
                if received.at < file.size:
                    raise UnreachableError(f"it ended {file.name} after {received.at} of {file.size} bytes")

            if received.at < file.size:
                patiently(more, lambda: received.at, retries=_RETRIES)
            os.fsync(partial.fileno())
            if received.digest() != file.digest:
                path.unlink()
                raise IOFailedError(
                    f"{file.name}: what came has the hash {received.digest()}, and was to have {file.digest}",
                    "It was damaged on the way and has been removed: run the same command again.",
                )
            path.rename(self._blob(file))


class _Received:
    """A file under way: what is on disk of it, and the hash of that."""

    def __init__(self, partial: BinaryIO, file: HubFile) -> None:
        self._partial, self._file = partial, file
        self.restart(keep=os.fstat(partial.fileno()).st_size <= file.size)

    def restart(self, *, keep: bool = False) -> None:
        """Begins anew; or, with `keep`, behind what is there."""
        # Git's id of a file is the SHA-1 of its length and its content.
        by_git = len(self._file.digest) == 40
        self._hash = hashlib.sha1(usedforsecurity=False) if by_git else hashlib.sha256()
        if by_git:
            self._hash.update(b"blob %d\0" % self._file.size)
        self.at = 0
        self._partial.seek(0)
        if not keep:
            self._partial.truncate()
        while keep and (piece := self._partial.read(_PIECE)):
            self._hash.update(piece)
            self.at += len(piece)

    def add(self, chunk: bytes) -> None:
        """Appends what has come, up to the size that was stated."""
        if self.at + len(chunk) > self._file.size:
            raise IOFailedError(
                f"{self._file.name}: more than the {self._file.size} bytes come that the Hub's listing says",
                "The Hub contradicts itself, or something between does: run again later.",
            )
        self._partial.write(chunk)
        self._partial.flush()  # whatever ends this process, it is there
        self._hash.update(chunk)
        self.at += len(chunk)

    def digest(self) -> str:
        """Of what has come, in hex."""
        return self._hash.hexdigest()


def _lock(partial: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(partial.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been finished, and renamed, between opening and locking.
        if os.path.samestat(os.fstat(partial.fileno()), path.stat()):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise IOFailedError(f"{path}: another run is downloading it", "Wait until it has ended, then run again.")
