"""Parse references to files of the Hugging Face Hub, and select the files of a repository that they name.

    reference = ORG/REPO[@REVISION]:QUANTISATION      the one model of that quantisation, all its parts
              | ORG/REPO[@REVISION]/PATH/FILE.gguf    that file, and the other parts if it is one of several
              | ORG/REPO[@REVISION]                   where a bundle is asked for: the bundle that it is;
                                                      else refused with a list of the repository's quantisations
              | an address of one of these            https://huggingface.co/…, hf.co/…, hf://…
    revision  = branch, tag or commit without a slash, or refs/pr/NUMBER; `main` if none is given

A path that exists on this machine is never a reference. Neither is `DIR/FILE` or `DIR/…/FILE.gguf` where DIR
exists: that is a mistyped path. The Hub is not trusted: its names, sizes and hashes are checked before use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from q6k_convert.errors import InputRejectedError, IOFailedError, Q6KConvertError
from q6k_kernels.bundle import manifest
from q6k_kernels.bundle.naming import may_be_in_bundle
from q6k_kernels.text import listing as joined

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

MAX_FILES = 100_000
SHOWN_FILES = 20
COMMIT = re.compile(r"[0-9a-f]{40}")
_MIN_BYTES = 24  # of a GGUF's header
_MAX_BYTES = 1 << 46  # more than any disk
_MAX_NAME, _MAX_COMPONENT = 1000, 255
_NAME = r"[a-z0-9_](?:[a-z0-9_.-]{0,94}[a-z0-9_])?"
_REFERENCE = re.compile(
    rf"(?P<repository>(?P<org>{_NAME})/{_NAME})"
    r"(?:@(?P<revision>refs/pr/[0-9]{1,9}|[a-z0-9_](?:[a-z0-9_.+-]{0,198}[a-z0-9_])?))?"
    r"(?::(?P<quantisation>[a-z][a-z0-9_-]{0,63})|/(?P<file>[^:]{1,1000}\.gguf))?",
    re.IGNORECASE | re.ASCII,
)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_ADDRESS = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]{{0,20}})://|(?:{'|'.join(map(re.escape, _HOSTS))})/", re.IGNORECASE | re.ASCII
)
_PAGE = re.compile(
    r"(?P<repository>[^/]+/[^/]+)(?:/(?P<view>resolve|blob|raw|tree)/(?P<revision>refs/pr/[0-9]{1,9}|[^/]+)"
    r"(?:/(?P<file>.+))?)?",
    re.DOTALL,
)
_FILE_ENDINGS = (".gguf", ".git", ".safetensors", ".bin", ".pt", ".pth", ".json", ".zip")
"""Endings of file names, in lower case: what has one is no repository."""
_PART = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reference:
    """A quantisation or a file of a repository at a revision, or the bundle that the repository is.

    Attributes:
        text: the reference in its short form, also if an address was given.
        quantisation, file: at most one of the two is given; the other is "".
        certain: whether the text cannot be a path, because it is an address or names a quantisation or a revision.
        bundle: whether the repository itself is meant, as a bundle; then both are "".
    """

    text: str
    repository: str
    revision: str
    quantisation: str
    file: str
    certain: bool
    bundle: bool = False

    def wants(self, name: str) -> bool:
        """Check whether a file of this name may be one that is meant."""
        return may_be_in_bundle(name) if self.bundle else name.lower().endswith(".gguf")

    @property
    def where(self) -> str:
        """Beginning of the messages of `reject`."""
        return f"{Path(self.text)}: on the Hub: "

    def reject(self, problem: str, remedy: str) -> InputRejectedError:
        """Return an error about the contents of the Hub."""
        return InputRejectedError(f"{self.where}{problem}", remedy)

    def malformed(self, what: str) -> InputRejectedError:
        """Return an error about a malformed answer of the Hub."""
        return self.reject(f"its answer is malformed: {what}", "Check HF_ENDPOINT, or run again later.")

    def absent(self, kind: type[Q6KConvertError], problem: str, remedy: str) -> Q6KConvertError:
        """Return an error of this kind or, if the text may be a mistyped path, an IOFailedError that says so."""
        if self.certain:
            return (
                self.reject(problem, remedy)
                if kind is InputRejectedError
                else kind(f"{self.text}: {problem}", remedy)
            )
        return IOFailedError(
            f"{self.text}: No such file or directory; and taken for a file of the Hub: {problem}",
            f"Check the path and its permissions; or, if the Hub is meant: {remedy}",
        )


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: path in the repository.
        size: size in bytes.
        digest: hash in hex: SHA-256 of the content (64 digits) or, for a small file kept in git, its git id (40).
    """

    name: str
    size: int
    digest: str


def parse(source: str, *, bundle: bool = False) -> Reference | None:
    """Return the reference in a command's argument; None if the argument is a path, even a mistyped one.

    Args:
        source: the argument.
        bundle: whether a bundle is asked for, and not a GGUF file.

    Raises:
        InputRejectedError: the argument is an address, but not of a model or a GGUF file on the Hub.
    """
    if os.path.lexists(source):
        return None
    address = _ADDRESS.match(source)
    text = _short(source, address) if address else source
    reference = _reference(text, certain=bool(address), bundle=bundle)
    if address and reference is None:
        raise _no_model(source, "it is not that of a model or of a .gguf file on the Hub")
    return reference


def _reference(text: str, *, certain: bool, bundle: bool) -> Reference | None:
    """Return the reference that a text in its short form is, or None."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    repository, revision, quantisation, file = (
        match[part] or "" for part in ("repository", "revision", "quantisation", "file")
    )
    certain = certain or bool(quantisation or revision)
    if (
        "--" in repository
        or ".." in repository + revision
        or repository.lower().endswith(_FILE_ENDINGS)
        or (file and not _is_safe(file))
        or (not certain and Path(match["org"]).exists())
    ):
        return None
    bundle = bundle and not (quantisation or file)
    return Reference(text, repository, revision or "main", quantisation, file, certain, bundle)


def _short(source: str, address: re.Match[str]) -> str:
    """Return the short form of an address of the Hub; "" if it leads to no model.

    Raises:
        InputRejectedError: it is an address of another place.
    """
    scheme = (address["scheme"] or "https").lower()
    if scheme == "hf":
        return source[address.end() :]
    try:
        parts = urlsplit(source if address["scheme"] else f"https://{source}")
        host = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.lower()
    except ValueError:
        raise _no_model(source, "it is malformed") from None
    if scheme not in ("http", "https") or parts.netloc.lower() not in {*_HOSTS, host} - {""}:
        raise _no_model(source, "only files of the Hugging Face Hub are fetched")
    path = unquote(parts.path).strip("/")
    if path.startswith(("datasets/", "spaces/")):
        return ""
    page = _PAGE.fullmatch(path)
    if page is None or page["view"] is None:
        shown = parse_qs(parts.query).get("show_file_info", [""])[0]  # as a file is opened on a model's page
        return path + (f"/{shown}" if shown else "")
    revision = "" if page["revision"] == "main" else f"@{page['revision']}"
    file = f"/{page['file']}" if page["file"] and page["view"] != "tree" else ""
    return f"{page['repository']}{revision}{file}"


def _no_model(source: str, why: str) -> InputRejectedError:
    """Return an error about an address. Its text is not repeated in full: it may hold a password or a token."""
    public = re.sub(r"//[^/]*@", "//", source.partition("?")[0].partition("#")[0])
    return InputRejectedError(
        f"{public}: an address that cannot be opened: {why}",
        "Download the GGUF file and give its path; of the Hub, ORG/REPO:QUANTISATION or ORG/REPO/FILE.gguf.",
    )


def listing(reference: Reference, info: ModelInfo) -> tuple[str, list[HubFile]]:
    """Check the Hub's answer about a repository, and return the commit and the files of a kind that it lists.

    Raises:
        InputRejectedError: a field is missing or malformed, or the answer is about another commit.
    """
    commit, siblings = info.sha, info.siblings
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise reference.malformed("it states no commit")
    if COMMIT.fullmatch(reference.revision) and commit != reference.revision:
        raise reference.malformed(f"it is about commit {commit}")
    if siblings is None or len(siblings) > MAX_FILES:
        raise reference.malformed(f"no list of at most {MAX_FILES} files")
    files = dict[str, HubFile]()
    for sibling in siblings:
        name, size = sibling.rfilename, sibling.size
        if not isinstance(name, str):
            raise reference.malformed("a file without a name")
        if not reference.wants(name):
            continue
        if not _is_safe(name) or name in files:
            raise reference.malformed(f"a file named {name[:200]!r}{' twice' if name in files else ''}")
        # A small file is kept in git itself and has only git's hash.
        digest, digits = (sibling.lfs.sha256, 64) if sibling.lfs else (sibling.blob_id, 40)
        if not isinstance(digest, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", digest):
            raise reference.malformed(f"{name} has no hash")
        if type(size) is not int or not (1 if reference.bundle else _MIN_BYTES) <= size <= _MAX_BYTES:
            raise reference.malformed(f"{name} has {size!r:.50} bytes")
        files[name] = HubFile(name, size, digest)
    return commit, list(files.values())


def selected(reference: Reference, files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files that the reference names, in order: one, all parts of a split one, or those of a bundle.

    Raises:
        InputRejectedError: there is no such file, a part is missing, or several files have the quantisation.
    """
    named = {file.name: file for file in files}
    if reference.bundle:
        if missing := [name for name in (manifest.NAME, manifest.METADATA_NAME) if name not in named]:
            raise reference.reject(
                f"the repository is not a bundle: it has no {joined(missing, most=2)}",
                f"If it has GGUF files, convert one: `q6k-convert {reference.repository}:QUANTISATION OUT/`.",
            )
        return sorted(files, key=lambda file: file.name != manifest.NAME)
    if not named:
        raise reference.reject(
            "the repository has no GGUF file at this revision",
            "Name one that has: the Hub lists those of a model as its quantizations.",
        )
    if not reference.quantisation and not reference.file:
        raise _unnamed(reference, named)
    chosen = reference.file or _quantised(reference, named)
    if reference.file and chosen not in named:
        raise reference.reject(
            f"no such file; there are: {joined(list(named), most=SHOWN_FILES)}", "Name one of those."
        )
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


def _unnamed(reference: Reference, named: dict[str, HubFile]) -> InputRejectedError:
    """Return an error that lists the models of a repository, for a reference that names none."""
    models = {_first_part(name): _label(name).upper() for name in named}
    labels = sorted({label for label in models.values() if label})
    first = f":{labels[0]}" if labels else f"/{min(models)}"
    listed = joined(labels or sorted(models), most=SHOWN_FILES)
    return reference.reject(
        f"it has {len(models)} GGUF models, and none is named: {listed}",
        f"Name one, like `{reference.text}{first}`.",
    )


def _quantised(reference: Reference, named: dict[str, HubFile]) -> str:
    """Return the name of the one file, or first part, of the reference's quantisation."""
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
    return matching[0]


def _first_part(name: str) -> str:
    """Return the name of the first part of a split file; of another file its own name."""
    part = _PART.fullmatch(name)
    return f"{part['stem']}-00001-of-{part['count']}.gguf" if part else name


def _label(name: str) -> str:
    """Return the quantisation at the end of a file's name, else of its directory's, in lower case; "" for none."""
    path = PurePosixPath(name)
    if path.name.lower().startswith("mmproj"):  # the vision part of a model, not the model
        return ""
    part = _PART.fullmatch(path.name)
    for place in (part["stem"] if part else path.stem, path.parent.name):
        if match := _LABEL.search(place):
            return match[1].casefold()
    return ""


def _is_safe(name: str) -> bool:
    """Check whether a file's name is a plain relative path that leads downwards."""
    components = name.split("/")
    return (
        len(name) <= _MAX_NAME
        and name.isprintable()
        and not {"\\", ":"} & set(name)
        and all(
            c not in ("", ".", "..") and len(c.encode("utf-8", "replace")) <= _MAX_COMPONENT for c in components
        )
    )
