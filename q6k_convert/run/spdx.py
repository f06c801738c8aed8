"""Describe where a bundle comes from, as an SPDX 2.3 document in JSON: its files, their source GGUF, the tool.

The same inputs give the same bytes: the document's namespace is a hash of its content. Its time, which the format
requires, is SOURCE_DATE_EPOCH, or 1970 if that is not set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_PIECE = 1 << 20
_NO_TIME = "No time was recorded: SOURCE_DATE_EPOCH was not set."


@dataclass(frozen=True)
class Hashed:
    """A file: its name in the document, and its hashes in hex. SPDX requires the SHA-1."""

    name: str
    sha1: str
    sha256: str


def hashed(path: Path, name: str) -> Hashed:
    """Return both hashes of a file, reading it once."""
    sha1, sha256 = hashlib.sha1(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha1.update(piece)
            sha256.update(piece)
    return Hashed(name, sha1.hexdigest(), sha256.hexdigest())


def provenance(
    name: str,
    bundle: Sequence[Hashed],
    source: Sequence[Hashed],
    *,
    origin: Row | None,
    license_words: str,
    options: Row,
    version: str,
    epoch: int | None,
) -> Row:
    """Return the document.

    Args:
        name: name of the model.
        bundle: files of the bundle.
        source: the GGUF file, or all parts of a split one.
        origin: Hub, repository and commit of a download, or None.
        license_words: licence that the GGUF states.
        options: options of the conversion.
        version: version of q6k-convert.
        epoch: time of the document in seconds since 1970, or None.
    """
    where: Row = {"downloadLocation": "NOASSERTION"}
    if origin is not None:
        repository, commit = origin["repository"], origin["commit"]
        purl = {
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": f"pkg:huggingface/{repository}@{commit}",
        }
        where = {"downloadLocation": f"git+{origin['hub']}/{repository}@{commit}", "externalRefs": [purl]}
        where["versionInfo"] = commit
    says = f"general.license of the GGUF file: {license_words}" if license_words else "The GGUF file names none."
    tool = {
        "SPDXID": "SPDXRef-Tool",
        "name": "q6k-convert",
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseDeclared": "MIT",
    }
    document: Row = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name}, a q6k-planar bundle",
        "creationInfo": {
            "created": datetime.fromtimestamp(epoch or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": [f"Tool: q6k-convert-{version}"],
        },
        "packages": [
            _package("Bundle", name, bundle, says)
            | {"downloadLocation": "NOASSERTION", "comment": f"Options: {json.dumps(options, sort_keys=True)}"},
            _package("Source", f"{name}, GGUF", source, says) | where,
            tool,
        ],
        "files": [*_files("Bundle", bundle), *_files("Source", source)],
        "relationships": [
            _relation("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-Bundle"),
            _relation("SPDXRef-Bundle", "GENERATED_FROM", "SPDXRef-Source"),
            _relation("SPDXRef-Tool", "BUILD_TOOL_OF", "SPDXRef-Bundle"),
            *(
                _relation(f"SPDXRef-{part}", "CONTAINS", file["SPDXID"])
                for part, files in (("Bundle", bundle), ("Source", source))
                for file in _files(part, files)
            ),
        ],
    }
    if epoch is None:
        document["creationInfo"]["comment"] = _NO_TIME
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return document | {"documentNamespace": f"https://spdx.org/spdxdocs/q6k-convert-{digest}"}


def _package(part: str, name: str, files: Sequence[Hashed], licence: str) -> Row:
    # SPDX 2.3, 7.9: the SHA-1 of all files' SHA-1s, sorted and joined.
    joined = "".join(sorted(file.sha1 for file in files)).encode()
    return {
        "SPDXID": f"SPDXRef-{part}",
        "name": name,
        "filesAnalyzed": True,
        "packageVerificationCode": {
            "packageVerificationCodeValue": hashlib.sha1(joined, usedforsecurity=False).hexdigest()
        },
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "licenseComments": licence,
        "licenseInfoFromFiles": ["NOASSERTION"],
        "copyrightText": "NOASSERTION",
    }


def _files(part: str, files: Sequence[Hashed]) -> list[Row]:
    return [
        {
            "SPDXID": f"SPDXRef-{part}-{number}",
            "fileName": f"./{file.name}",
            "checksums": [
                {"algorithm": "SHA1", "checksumValue": file.sha1},
                {"algorithm": "SHA256", "checksumValue": file.sha256},
            ],
            "licenseConcluded": "NOASSERTION",
            "licenseInfoInFiles": ["NOASSERTION"],
            "copyrightText": "NOASSERTION",
        }
        for number, file in enumerate(files)
    ]


def _relation(of: str, kind: str, to: str) -> Row:
    return {"spdxElementId": of, "relationshipType": kind, "relatedSpdxElement": to}
