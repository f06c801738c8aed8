"""What a reference to a file of the Hugging Face Hub means, and which of a repository's files that is.

    reference = ORG/REPO[@REVISION]:QUANTISATION      the one model of that quantisation, all its parts
              | ORG/REPO[@REVISION]/PATH/FILE.gguf    that file, and the other parts if it is one of several
    revision  = branch, tag or commit without a slash, or refs/pr/NUMBER; `main` if none is given

What exists here is never a reference. Neither is `DIR/FILE.gguf`, nor `DIR/…/FILE.gguf` if there is a DIR here:
those are mistyped paths. All that the Hub says is untrusted: names, sizes and hashes are checked before use.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from q6k_convert.errors import InputRejectedError, IOFailedError, Q6KConvertError
from q6k_convert.text import listing as joined

MAX_FILES = 100_000
MAX_LISTING_BYTES = 32 << 20
_MIN_BYTES = 24  # of a GGUF's header
_MAX_BYTES = 1 << 46  # more than any disk
_MAX_NAME, _MAX_COMPONENT = 1000, 255
SHOWN_FILES = 20
_NAME = r"[a-z0-9_](?:[a-z0-9_.-]{0,94}[a-z0-9_])?"
_REFERENCE = re.compile(
    rf"(?P<repository>(?P<org>{_NAME})/{_NAME})"
    r"(?:@(?P<revision>refs/pr/[0-9]{1,9}|[a-z0-9_](?:[a-z0-9_.+-]{0,198}[a-z0-9_])?))?"
    r"(?::(?P<quantisation>[a-z][a-z0-9_-]{0,63})|/(?P<file>[^:]{1,1000}\.gguf))",
    re.IGNORECASE | re.ASCII,
)
_PART = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reference:
    """What was asked for: a quantisation or a file of a repository at a revision.

    Attributes:
        certain: whether it cannot be meant as a path: it names a quantisation or a revision.
    """

    text: str
    repository: str
    revision: str
    quantisation: str | None
    file: str | None
    certain: bool

    @property
    def where(self) -> str:
        """What the text of `reject`'s errors begins with."""
        return f"{Path(self.text)}: on the Hub: "

    def reject(self, problem: str, remedy: str) -> InputRejectedError:
        """An error about what the Hub has, or says that it has."""
        return InputRejectedError(Path(self.text), "on the Hub", problem, remedy=remedy)

    def absent(self, kind: type[Q6KConvertError], problem: str, remedy: str) -> Q6KConvertError:
        """An error that leaves open whether the Hub was meant, if it does."""
        if self.certain:
            return kind(f"{self.text}: {problem}", remedy)
        return IOFailedError(
            f"{self.text}: No such file or directory; and taken for a file of the Hub: {problem}",
            f"Check the path and its permissions; or, if the Hub is meant: {remedy}",
        )


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path there, its bytes, and its hash.

    Attributes:
        digest: SHA-256 of the content in hex (64 digits) or, for what is kept in git itself, git's id of it
            (40); "" where nothing but the cache was asked.
    """

    name: str
    size: int
    digest: str = ""


def parse(source: str) -> Reference | None:
    """The reference that a command's argument is; None if it is a path, also a mistyped one."""
    match = _REFERENCE.fullmatch(source)
    if match is None or os.path.lexists(source):
        return None
    repository, file = match["repository"], match["file"]
    certain = file is None or match["revision"] is not None
    looks_wrong = (
        "--" in repository or ".." in repository + (match["revision"] or "")
    ) or repository.lower().endswith((".gguf", ".git"))
    if looks_wrong or (file is not None and not _is_safe(file)) or (not certain and Path(match["org"]).exists()):
        return None
    return Reference(source, repository, match["revision"] or "main", match["quantisation"], file, certain)


def listing(reference: Reference, answer: bytes) -> tuple[str, list[HubFile]]:
    """The commit and the GGUF files in the Hub's answer, every field checked."""

    def wrong(what: str) -> InputRejectedError:
        return reference.reject(f"its answer cannot be: {what}", "Check HF_ENDPOINT, or run again later.")

    if len(answer) > MAX_LISTING_BYTES:
        raise wrong(f"more than {MAX_LISTING_BYTES} bytes")
    try:
        info: Any = json.loads(answer.decode())
    except (ValueError, RecursionError):
        raise wrong("no JSON, or nested too deeply") from None
    commit, entries = (info.get("sha"), info.get("siblings")) if isinstance(info, dict) else (None, None)
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise wrong("it states no commit")
    if not isinstance(entries, list) or len(entries) > MAX_FILES:
        raise wrong(f"no list of at most {MAX_FILES} files")
    files = dict[str, HubFile]()
    for entry in entries:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise wrong("a file without a name")
        if not name.lower().endswith(".gguf"):
            continue
        if not _is_safe(name) or name in files:
            raise wrong(f"a file named {name[:200]!r}{' twice' if name in files else ''}")
        size, lfs = entry.get("size"), entry.get("lfs")
        # Of a small file, kept in git itself, there is only git's own hash.
        digest = lfs.get("sha256") if isinstance(lfs, dict) else entry.get("blobId")
        digits = 64 if isinstance(lfs, dict) else 40
        if lfs is not None and not isinstance(lfs, dict):
            raise wrong(f"{name} has no hash")
        if (
            type(size) is not int
            or not isinstance(digest, str)
            or not re.fullmatch(f"[0-9a-f]{{{digits}}}", digest)
        ):
            raise wrong(f"{name} has no size or no hash")
        if not _MIN_BYTES <= size <= _MAX_BYTES:
            raise wrong(f"{name} has {size} bytes")
        files[name] = HubFile(name, size, digest)
    return commit, list(files.values())


def selected(reference: Reference, files: Sequence[HubFile]) -> list[HubFile]:
    """The files that the reference means, in order: one, or all parts of a split one."""
    named = {file.name: file for file in files}
    if not named:
        raise reference.reject("the repository has no GGUF file at this revision", "Name another repository.")
    if (chosen := reference.file) is not None:
        if chosen not in named:
            raise reference.reject(
                f"no such file; there are: {joined(list(named), most=SHOWN_FILES)}", "Name one of those."
            )
    else:
        assert reference.quantisation is not None  # noqa: S101 -- for the type checker
        models = {_first_part(name): _label(name) for name in named}
        wanted = reference.quantisation.casefold()
        matching = [name for name, label in models.items() if label == wanted]
        if not matching:
            labels = sorted({label.upper() for label in models.values() if label})
            has = joined(labels or sorted(models), most=SHOWN_FILES)
            raise reference.reject(f"no file of this quantisation; there are: {has}", "Name one of those.")
        if len(matching) > 1:
            raise reference.reject(
                f"{len(matching)} files of this quantisation: {joined(matching, most=SHOWN_FILES)}",
                f"Name the file: `{reference.repository}@{reference.revision}/{matching[0]}`.",
            )
        chosen = matching[0]
    part = _PART.fullmatch(chosen)
    if part is None:
        return [named[chosen]]
    count = int(part["count"])
    names = [f"{part['stem']}-{number:05}-of-{part['count']}.gguf" for number in range(1, count + 1)]
    if missing := [name for name in names if name not in named] or ([] if chosen in names else [chosen]):
        raise reference.reject(
            f"split parts missing of {chosen}: {joined(missing, most=5)}", "Name a model that is whole."
        )
    return [named[name] for name in names]


def _first_part(name: str) -> str:
    part = _PART.fullmatch(name)
    return f"{part['stem']}-00001-of-{part['count']}.gguf" if part else name


def _label(name: str) -> str:
    """The quantisation that a file's name ends in, or else its directory's; "" for none, in lower case."""
    path = PurePosixPath(name)
    if path.name.lower().startswith("mmproj"):  # the part of a model that sees; not the model
        return ""
    part = _PART.fullmatch(path.name)
    for place in (part["stem"] if part else path.stem, path.parent.name):
        if match := _LABEL.search(place):
            return match[1].casefold()
    return ""


def _is_safe(name: str) -> bool:
    """Whether a file's name is a plain relative path that leads downwards."""
    components = name.split("/")
    return (
        len(name) <= _MAX_NAME
        and name.isprintable()
        and not {"\\", ":"} & set(name)
        and all(
            c not in ("", ".", "..") and len(c.encode("utf-8", "replace")) <= _MAX_COMPONENT for c in components
        )
    )
