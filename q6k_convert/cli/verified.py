"""Describe a verification as plain data, for tables and for `--json`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from q6k_convert.cli.contents import Row, bits_per_weight, bundle_contents
from q6k_convert.errors import ExitCode

if TYPE_CHECKING:
    from q6k_convert.verify.comparison import Exactness
    from q6k_convert.verify.stages import Verification


def verification_contents(run: Verification, peak_memory: int) -> Row:
    """Describe a verification: verdict, stages, findings, sizes, and the results for each tensor."""
    manifest = run.manifest
    bundle = bundle_contents(run.directory, manifest) if manifest else None
    faults = Counter(finding.tensor for _, finding in run.findings if finding.tensor is not None)
    return {
        "status": "failed" if run.failed else "verified",
        "exit_code": int(ExitCode.VERIFICATION_FAILED if run.failed else ExitCode.DONE),
        "bundle": str(run.directory),
        "producer": bundle["producer"] if bundle else "",
        "architecture": bundle["architecture"] if bundle else "",
        "options": bundle["options"] if bundle else {},
        "sources": bundle["sources"] if bundle else [],
        "types": _with_source(bundle["types"], run) if bundle else [],
        "bytes": bundle["bytes"] if bundle else 0,
        "bits_per_weight": bundle["bits_per_weight"] if bundle else None,
        "stages": [
            {
                "stage": stage.name,
                "state": stage.state,
                "detail": stage.detail,
                "seconds": round(stage.seconds, 3),
                "bytes": stage.bytes,
            }
            for stage in run.stages
        ],
        "findings": [{"stage": stage, **asdict(finding)} for stage, finding in run.findings],
        "tensors": [
            {
                "name": t.name,
                "type": t.type,
                "shape": t.shape,
                "storage": t.storage,
                "format": t.format,
                "bytes": t.nbytes,
                "bits_per_weight": bits_per_weight([t]) if t.arrays else None,
                "findings": faults[t.name],
                "nonfinite_scales": run.content.nonfinite[t.name] if run.content else None,
                "source": _exactness(run.source.tensors.get(t.name)) if run.source else None,
                "device": [asdict(r) for r in runs] if (runs := run.runs(t.name)) else None,
            }
            for t in (manifest.tensors if manifest else [])
        ],
        "peak_memory_bytes": peak_memory,
        "nonfinite_scales": run.content.nonfinite.total() if run.content else None,
        "source_totals": _exactness(run.source.total) if run.source and run.source.tensors else None,
    }


def _with_source(types: list[Row], run: Verification) -> list[Row]:
    """Return the rows of `_by_type` with the figures of their tensors that were compared with the source."""
    from q6k_convert.verify.comparison import Exactness

    totals = dict[tuple[str, str], Exactness]()
    for t in run.manifest.tensors if run.manifest else []:
        if run.source and (compared := run.source.tensors.get(t.name)):
            totals.setdefault((t.type, t.storage), Exactness()).add(compared)
    return [{**row, "source": _exactness(totals.get((row["type"], row["storage"])))} for row in types]


def _exactness(found: Exactness | None) -> Row | None:
    if found is None:
        return None
    return {
        "equal": found.equal,
        "exact": found.exact,
        "snr_db": None if found.snr_db is None else round(found.snr_db, 2),
        "max_scale_error": _finite(found.max_scale_error),
        "nonfinite_scales": found.nonfinite,
    }


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold: None for infinity."""
    return value if value is not None and math.isfinite(value) else None
