"""Change bundles and correct their checksums, as a careful forger would, and list what verification finds."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from q6k_convert.verify.stages import Verification
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.structure import Finding

SHARD = "model.safetensors"
QL = "token_embd.weight.ql"


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and correct its checksum."""
    path = directory / "bundle.json"
    content = json.loads(path.read_bytes())
    del content["manifest_checksum"]
    change(content)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    content["manifest_checksum"] = manifests.checksum(text.encode())
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_header(directory: Path, change: Callable[[bytes], bytes], name: str = SHARD) -> None:
    """Replace a shard's header text, and correct the shard's size and checksum in the manifest."""
    path = directory / name
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    text = change(raw[8 : 8 + length])
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    path.write_bytes(header + raw[8 + length :])
    resign(directory, name, len(header))


def resign(directory: Path, name: str, checked: int) -> None:
    raw = (directory / name).read_bytes()
    entry = {"size": len(raw), "checked_bytes": checked, "checksum": manifests.checksum(raw[:checked])}
    edit_manifest(directory, lambda content: content["files"].update({name: entry}))


def edit_entries(directory: Path, change: Callable[[dict[str, Any]], object], name: str = SHARD) -> None:
    """Change a shard's header as JSON."""

    def rewrite(text: bytes) -> bytes:
        content = json.loads(text)
        change(content)
        return json.dumps(content, separators=(",", ":")).encode()

    edit_header(directory, rewrite, name)


def tensor(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in content["tensors"] if t["name"] == name)


def only_finding(run: Verification, stage: str) -> Finding:
    assert run.failed
    assert [where for where, _ in run.findings] == [stage], run.findings
    return run.findings[0][1]


def states(run: Verification) -> dict[str, str]:
    return {stage.name: stage.state for stage in run.stages}


def tensor_edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit_manifest(directory, lambda content: change(tensor(content, name)))
