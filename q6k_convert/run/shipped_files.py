"""Stamp, hash and write the files of a CI run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from q6k_convert.convert.plan import Plan
from q6k_kernels.bundle import manifest as manifests


def stamps(paths: Any) -> list[Any]:
    """Return name, size and time of the files that exist."""
    found = [(path.name, path.stat()) for path in sorted(paths) if path.exists()]
    return [[name, each.st_size, each.st_mtime_ns] for name, each in found]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, content: dict[str, Any] | str) -> None:
    """Write a text or JSON file that appears complete or not at all."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def origin(plan: Plan) -> Any:
    """Return, as JSON holds it, what a bundle will be made of: options, names and sizes of the source files."""
    return json.loads(
        json.dumps([plan.options.recorded(), [[part.path.name, part.size] for part in plan.model.parts]])
    )


def origin_of(bundle: Path) -> Any:
    """Return what a bundle was made of, as `origin` does; None if there is no bundle."""
    try:
        found = manifests.read(bundle)
    except manifests.BundleError:
        return None
    return [found.options, [[source.name, source.size] for source in found.sources]]
