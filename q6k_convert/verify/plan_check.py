"""Compare a manifest with the plan that its recorded options give for the source.

Checksums find damage but no forger, who can correct them. So with a source at hand all that the manifest states is
computed again: what is tied, how each tensor is stored, in which file each array lies, and every file's header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from q6k_convert.convert.plan import Options, Plan, make_plan
from q6k_convert.errors import Q6KConvertError
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.manifest import METADATA_NAME, Manifest
from q6k_kernels.bundle.shards import INDEX_NAME, index_json
from q6k_kernels.bundle.structure import Finding
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.model import GGUFModel

_PRODUCER = re.compile(r"q6k-convert \d{1,4}(\.\d{1,4}){1,3}([a-z+.-][\w+.-]{0,40})?", re.ASCII)
_FIELDS = ("storage", "format", "arrays")


def check_plan(manifest: Manifest, model: GGUFModel) -> Iterator[Finding]:
    """Find what the manifest states otherwise than a conversion of this source with its options.

    The manifest lists the source's tensors, which has been checked before.
    """
    if not _PRODUCER.fullmatch(manifest.producer):
        yield Finding(
            f"producer: expected q6k-convert and its version, found {manifest.producer!r:.80}", manifests.NAME
        )
    try:
        plan = make_plan(model, Options.of_record(manifest.options))
    except ValueError as error:
        yield Finding(f"options: {error}", manifests.NAME)
        return
    except (Q6KConvertError, GgufRejectedError) as error:
        yield Finding(f"the recorded options give no bundle of this source: {error.cause}", manifests.NAME)
        return
    if manifest.tied != plan.tied:
        problem = f"tied: expected {_shown(plan.tied)}, as the source has it, found {_shown(manifest.tied)}"
        yield Finding(problem, manifests.NAME)
    yield from _check_tensors(manifest, plan)
    yield from _check_files(manifest, plan)


def _check_tensors(manifest: Manifest, plan: Plan) -> Iterator[Finding]:
    """Find the first tensor that is not stored as planned."""
    files = {array.key: shard.name for shard in plan.shards for array in shard.arrays}
    for stored, planned in zip(manifest.tensors, plan.tensors, strict=True):
        listed = {role: (a.key, a.dtype, tuple(a.shape), a.file) for role, a in stored.arrays.items()}
        arrays = {role: (a.key, a.dtype, a.shape, files[a.key]) for role, a in planned.arrays.items()}
        found, expected = (stored.storage, stored.format, listed), (planned.storage, planned.format, arrays)
        for field, ours, theirs in zip(_FIELDS, found, expected, strict=True):
            if ours != theirs:
                problem = f"{field}: the recorded options give {_shown(theirs)}, found {_shown(ours)}"
                yield Finding(problem, manifests.NAME, stored.name)
                return


def _check_files(manifest: Manifest, plan: Plan) -> Iterator[Finding]:
    """Find files that the options do not give, or whose header they give otherwise."""
    headers = {shard.name: shard.header for shard in plan.shards}
    if len(plan.shards) > 1:
        headers[INDEX_NAME] = index_json(plan.shards)
    expected = {*headers, METADATA_NAME}
    for name in sorted(expected ^ set(manifest.files)):
        what = "is missing: the recorded options give it" if name in expected else "is no file of such a bundle"
        yield Finding(f"files: {name[:80]!r} {what}", manifests.NAME)
    for name, header in headers.items():
        file = manifest.files.get(name)
        if file is not None and (file.checked_bytes, file.checksum) != (len(header), manifests.checksum(header)):
            yield Finding("its header is not the one that the recorded options give", name)


def _shown(value: object) -> str:
    return f"{value!r:.120}" if value else "none"
