"""Bundles that were published on the Hugging Face Hub, by name: ORG/REPO, or ORG/REPO@REVISION."""

from __future__ import annotations

import os
import re
from pathlib import Path

from q6k_kernels.bundle.manifest import BundleError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@(refs/pr/[0-9]{{1,9}}|{_PART}))?")
_OF_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_FILES = ("bundle.json", "metadata.gguf", "model*.safetensors", "model.safetensors.index.json")


def directory_of(path: str | os.PathLike[str]) -> Path:
    """Return a path itself or, for the name of a published bundle, its directory in the Hub's cache.

    A path that exists is never a name, nor is `DIR/NAME` where DIR exists: that is a mistyped path. huggingface_hub
    fetches the files; it comes with transformers.

    Raises:
        BundleError: there is neither such a path nor such a repository, or it cannot be fetched.
    """
    match = _NAME.fullmatch(os.fspath(path))
    if match is None or os.path.lexists(path) or (match[2] is None and Path(match[1]).parent.exists()):
        return Path(path)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(snapshot_download(match[1], revision=match[2] or "main", allow_patterns=list(_FILES)))
        except (HfHubHTTPError, OSError) as error:
            # Not its text, which may have a signed address.
            problem = f"not on the Hub, or it cannot be fetched ({type(error).__name__})"
    except ImportError:
        problem = "huggingface_hub, which fetches bundles of the Hub, is not installed"
    raise BundleError(f"{path} is not a bundle: there is no such directory, and {problem}")


def completed(directory: Path) -> Path:
    """Return a bundle's directory; in the Hub's cache the files that transformers does not know are fetched before.

    Raises:
        BundleError: they cannot be fetched.
    """
    found = _OF_CACHE.fullmatch("/".join(directory.parts[-3:]))
    if found is None or all((directory / name).exists() for name in _FILES[:2]):
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name = f"{found[1]}/{found[2]}"
    try:
        fetched = snapshot_download(
            name, revision=found[3], cache_dir=directory.parents[2], allow_patterns=list(_FILES)
        )
    except (HfHubHTTPError, OSError) as error:
        # Not its text, which may have a signed address.
        raise BundleError(f"{name}: its bundle cannot be fetched ({type(error).__name__})") from error
    return Path(fetched)
