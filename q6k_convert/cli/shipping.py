"""Make a bundle that can be shipped from a GGUF file, step by step; `ci_command` says what the steps are.

OUT/report.json has the results of all steps. A step that was done is skipped while its inputs and outputs are
unchanged, so a run that was cut short resumes, and a repeated run does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from q6k_convert import __version__
from q6k_convert.cli import contents
from q6k_convert.cli.reporting import peak_memory
from q6k_convert.cli.shipping_request import STEPS, ShippingRequest
from q6k_convert.cli.terminal import Terminal
from q6k_convert.cli.verified import verification_contents
from q6k_convert.convert.pipeline import default_jobs
from q6k_convert.convert.pipeline import run as run_conversion
from q6k_convert.convert.plan import Options, make_plan
from q6k_convert.errors import ExitCode, UsageError
from q6k_convert.hub import resolve
from q6k_convert.run.shipped_files import origin, origin_of, sha256, stamps, write
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.gguf.model import open_gguf

Row = dict[str, Any]
STATE = ".ci_export.json"
REPORT, PROVENANCE, CHECKSUMS = "report.json", "provenance.spdx.json", "SHA256SUMS"
PROGRAM = "model.pt2"


class Shipping:
    """One run: the state of the steps and their results."""

    def __init__(self, request: ShippingRequest, terminal: Terminal) -> None:
        self.request, self.terminal = request, terminal
        self.out = request.out
        self.bundle = self.out / "bundle"
        self.did = list[str]()
        self.step = "download"
        self.source = Path()
        self.download: Row = {}
        self.state: Row = {}

    def run(self) -> None:
        """Run all steps that are not skipped, then write the report.

        Raises:
            typer.Exit: the verification fails, or the answer is out of bounds.
            Q6KConvertError, GgufError, BundleError, ModelError, OSError: a command fails.
        """
        self.state = self._read_state()
        try:
            # Every later step needs the files that this step finds; if skipped, it fetches nothing.
            self._download()
            for name in STEPS[1:]:
                self._step(name)
        except typer.Exit:
            raise
        except Exception as error:
            write(self.out / REPORT, self._report({"step": self.step, "error": str(error)}))
            raise
        report = self._report()
        if self.did or not (self.out / REPORT).exists():
            write(self.out / REPORT, report)
            self.terminal.note(f"done: {', '.join(self.did) or 'the report'}; see {self.out / REPORT}")
        else:
            self.terminal.note(f"nothing to do: {self.out} is up to date")
        self.terminal.document(report)

    def _step(self, name: str) -> None:
        self.step = name
        if name in self.request.skip:
            self.terminal.note(f"{name}: skipped")
        elif self._is_done(name):
            self.terminal.note(f"{name}: done before")
        else:
            self.terminal.note(f"{name}: begins")
            self.did.append(name)
            # Remove what describes an older state. The bundle itself is replaced once the new one is complete.
            for stale in (REPORT, *((PROGRAM, PROVENANCE, CHECKSUMS) if name == "convert" else ())):
                (self.out / stale).unlink(missing_ok=True)
            self.state.pop(name, None)
            self._write_state()
            key = self._key(name)
            work: Callable[[], Row] = getattr(self, f"_{name}")
            result = work()
            if result.get("status") == "failed":
                report = self._report({"step": name, "result": result})
                write(self.out / REPORT, report)
                self.terminal.document(report)
                raise typer.Exit(int(ExitCode.VERIFICATION_FAILED))
            self.state[name] = {"inputs": key, "outputs": self._outputs(name), "result": result}
            self._write_state()

    def _is_done(self, name: str) -> bool:
        known = self.state.get(name)
        return (
            isinstance(known, dict)
            and known.get("inputs") == self._key(name)
            and known.get("outputs") == self._outputs(name)
        )

    def _download(self) -> None:
        found = resolve(
            self.request.model,
            self.terminal.note,
            self.terminal.progress,
            download="download" not in self.request.skip,
        )
        if found.path is None:
            raise UsageError(
                f"{self.request.model} is not in the cache, and --skip download was given", "Leave it out."
            )
        self.source = found.path
        self.download = found.document.get("download", {})
        if self.download.get("bytes_to_download"):
            self.did.append("download")

    def _convert(self) -> Row:
        with open_gguf(self.source) as model:
            plan = make_plan(model, Options(self.request.scales, self.request.other))
            self.terminal.plan(contents.plan_contents(plan))
            # A run may replace what an earlier run wrote, also one that was killed before it could say so.
            old, known = origin_of(self.bundle), self.state.get("origins", [])
            force = self.request.force or old in known
            self.state["origins"] = [*(each for each in known if each == old), origin(plan)]
            self._write_state()
            with self.terminal.progress(plan.bytes_in, "converting") as tell:
                result = run_conversion(plan, self.bundle, jobs=default_jobs(), force=force, progress=tell)
        row = contents.result_contents(result, 0)
        names = ("tensors_planar", "tensors_other", "tensors_skipped", "bytes_in", "bytes_out", "bits_per_weight")
        return {"options": result.manifest.options, **{name: row[name] for name in names}}

    def _verify(self) -> Row:
        from q6k_convert.verify.stages import verify

        run = verify(
            self.bundle,
            source=self.source,
            device=self.request.device,
            jobs=default_jobs(),
            progress=self.terminal.progress,
        )
        row = verification_contents(run, peak_memory())
        self.terminal.verification(row, all_tensors=False)
        stages = [{name: stage[name] for name in ("stage", "state", "detail")} for stage in row["stages"]]
        return {
            "status": row["status"],
            "stages": stages,
            "findings": row["findings"],
            "source_totals": row["source_totals"],
        }

    def _answer(self) -> Row:
        from q6k_convert.run.generate_command import GenerateRequest
        from q6k_convert.run.sampling_request import SamplingRequest
        from q6k_convert.run.sanity import answer
        from q6k_convert.run.session import ModelRequest

        asked, terminal = self.request, self.terminal
        request = GenerateRequest(
            model=ModelRequest(self.bundle, device=asked.device),
            prompt=asked.prompt,
            max_new_tokens=asked.max_new_tokens,
            # The likeliest tokens, whatever the file states: the answer has to be the same in every run.
            sampling=SamplingRequest(temperature=0.0, repeat_penalty=1.0),
        )
        bounds = {"perplexity": asked.max_perplexity, "repetition": asked.max_repetition}
        row, faults = answer(request, bounds, terminal.stream, terminal.note, terminal.progress)
        if faults:
            terminal.error(
                f"the model's answer is not to be trusted: {'; '.join(faults)}",
                "Compare it with that of another program; --max-perplexity and --max-repetition set the bounds.",
            )
        return row

    def _export(self) -> Row:
        from q6k_convert.run.export_command import ExportRequest, run

        reason = self._no_program()
        if reason is not None:
            (self.out / PROGRAM).unlink(missing_ok=True)  # the program of an earlier run on another machine
            self.terminal.note(f"export: nothing to do, {reason}")
            return {"status": "left out", "reason": reason}
        asked = self.request
        request = ExportRequest(self.bundle, self.out / PROGRAM, asked.capacity, asked.device, force=True)
        row = run(request, self.terminal.note, self.terminal.progress)
        names = ("device", "capability", "dtype", "torch", "capacity", "chunk", "bytes", "operations", "check")
        return {"file": PROGRAM, **{name: row[name] for name in names}}

    def _no_program(self) -> str | None:
        """Return why no program is exported, or None if one is."""
        from q6k_convert.verify.device_stage import missing_for_cuda

        if self.request.export == "always":
            return None
        if self.request.device == "cpu":
            return "--device is cpu"
        missing = missing_for_cuda()
        return missing.what if missing else None

    def _provenance(self) -> Row:
        from q6k_convert.run.spdx import hashed, provenance

        manifest = manifests.read(self.bundle)
        with open_gguf(self.source) as model:
            parts = [part.path for part in model.parts]
            words = model.value("general.license", "")
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is not None and not (epoch.isdecimal() and int(epoch) < 1 << 37):
            raise UsageError(f"SOURCE_DATE_EPOCH is {epoch!r}, expected seconds since 1970", "Set or unset it.")
        files = sorted([*manifest.files, manifests.NAME])
        document = provenance(
            parts[0].name.removesuffix(".gguf"),
            [hashed(path, name) for name, path in self._made(files).items()],
            [hashed(path, path.name) for path in parts],
            origin=self.download or None,
            license_words=words if isinstance(words, str) else "",
            options=manifest.options,
            version=__version__,
            epoch=None if epoch is None else int(epoch),
        )
        write(self.out / PROVENANCE, document)
        return {"file": PROVENANCE, "namespace": document["documentNamespace"]}

    def _checksums(self) -> Row:
        lines = [f"{sha256(path)}  {name}\n" for name, path in self._listed().items()]
        write(self.out / CHECKSUMS, "".join(lines))
        return {"file": CHECKSUMS, "files": len(lines)}

    # State

    def _listed(self) -> dict[str, Path]:
        """Return the files to list in SHA256SUMS, by their names in OUT."""
        made = self._made(path.name for path in self.bundle.iterdir())
        more = {PROVENANCE: self.out / PROVENANCE} if (self.out / PROVENANCE).exists() else {}
        return dict(sorted((made | more).items()))

    def _made(self, files: Iterable[str]) -> dict[str, Path]:
        """Return the bundle's files and the program, if there is one, by their names in OUT."""
        names = [*(f"bundle/{name}" for name in files), *([PROGRAM] if (self.out / PROGRAM).exists() else [])]
        return {name: self.out / name for name in names}

    def _key(self, step: str) -> str:
        """Return a hash of everything that a step depends on."""
        asked = self.request
        with open_gguf(self.source) as model:
            source = [[part.path.name, part.size, part.stat.st_mtime_ns] for part in model.parts]
        bundle = stamps(self.bundle.iterdir()) if self.bundle.is_dir() else []
        program = stamps([self.out / PROGRAM])
        where = {name: self.download.get(name) for name in ("hub", "repository", "commit")}
        parts: dict[str, list[Any]] = {
            "convert": [source, asked.scales, asked.other],
            "verify": [source, bundle, asked.device],
            "answer": [
                bundle, asked.device, asked.prompt, asked.max_new_tokens, asked.max_perplexity, asked.max_repetition
            ],
            "export": [bundle, asked.device, asked.capacity, self._no_program() if step == "export" else None],
            "provenance": [source, bundle, program, where, os.environ.get("SOURCE_DATE_EPOCH")],
            "checksums": [stamps(self._listed().values())] if self.bundle.is_dir() else [],
        }  # fmt: skip
        return hashlib.sha256(json.dumps([__version__, step, parts[step]]).encode()).hexdigest()

    def _outputs(self, step: str) -> list[Any]:
        """Return the present name, size and time of a step's outputs."""
        if step == "convert":
            return stamps(self.bundle.iterdir()) if self.bundle.is_dir() else []
        files = {"export": PROGRAM, "provenance": PROVENANCE, "checksums": CHECKSUMS}
        return stamps([self.out / files[step]]) if step in files else []

    def _read_state(self) -> Row:
        try:
            state = json.loads((self.out / STATE).read_bytes())
        except (FileNotFoundError, ValueError):  # missing or cut short: do every step
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self) -> None:
        write(self.out / STATE, self.state)

    def _report(self, failure: Row | None = None) -> Row:
        known = [name for name in STEPS if name in self.state and self._is_done(name)]
        steps = {name: self.state[name]["result"] for name in known}
        if self.download:
            of = {name: self.download[name] for name in ("hub", "repository", "revision", "commit")}
            steps = {"download": of} | steps
        report = {
            "status": "failed" if failure else "passed",
            "producer": f"q6k-convert {__version__}",
            "model": self.request.model if self.download else self.source.name,
            "skipped": [name for name in STEPS if name in self.request.skip],
            "steps": steps,
        }
        return report | ({"failure": failure} if failure else {})
