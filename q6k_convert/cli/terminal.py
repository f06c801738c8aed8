"""Print plans, progress, results, listings and errors for people. Numbers come from `contents`."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.cli.contents import Row
from q6k_convert.cli.streams import PlainLines, console, is_utf_8, json_text, naming_stdout
from q6k_convert.cli.tables import (
    STORAGE_WORDS,
    Table,
    compared,
    decibel,
    growth,
    memory,
    printable,
    readable,
    runnable,
    sizes,
    styled,
)
from q6k_convert.text import displayable

if TYPE_CHECKING:
    from rich.console import Console

_FINDINGS = 50
_WORST = 15


class Terminal:
    """Output for people; with `as_json`, one document on stdout and everything else on stderr."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        for stream in (sys.stdout, sys.stderr):
            # A terminal or pipe that is not UTF-8 gets "?" for what it cannot show; streams of tests may be bare.
            if not is_utf_8(stream) and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    @cached_property
    def _out(self) -> Console:
        return console(stderr=self.as_json, quiet=self.quiet)

    @cached_property
    def _err(self) -> Console:
        return console(stderr=True)

    def document(self, content: Row) -> None:
        """Print the JSON document if `--json` was given."""
        if self.as_json:
            with naming_stdout():
                print(json_text(content), flush=True)

    def error(self, cause: str, remedy: str = "") -> None:
        """Print a red line for the cause and one for the remedy, on stderr."""
        for label, line in (("error", cause), ("try", remedy)):
            if line:
                self._err.print(f"{label}: {printable(line)}", style="red", soft_wrap=True)

    def note(self, line: str) -> None:
        """Print a line about what the program is doing, on stderr."""
        if not self.quiet:
            self._err.print(printable(line), soft_wrap=True)

    def show(self, lines: str) -> None:
        """Print a result on stdout."""
        with naming_stdout():
            print(lines, flush=True)

    def stream(self, piece: str) -> None:
        """Print a piece of a model's answer on stdout, unless stdout is for the JSON document."""
        if not self.as_json:
            # A model may emit control characters; a terminal gets only newlines, tabs and what is printable.
            safe = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in displayable(piece))
            with naming_stdout():
                sys.stdout.write("".join(safe) if sys.stdout.isatty() else displayable(piece))
                sys.stdout.flush()

    def traceback(self) -> None:
        """Print the traceback of the exception being handled, for `--verbose`."""
        self._err.print_exception()

    def plan(self, plan: Row) -> None:
        """Print what a conversion is going to do."""
        if self.quiet:
            return
        sources = plan["sources"]
        more = f" and {text.plural(len(sources) - 1, 'more part')}" if len(sources) > 1 else ""
        head = " (head tied to the token embedding)" if plan["tied_head"] else ""
        architecture = plan["architecture"] or "of unnamed architecture"
        self._say(f"{sources[0]}{more}: {architecture}, {text.plural(plan['tensors'], 'tensor')}{head}")
        table = Table("type", "tensors>", "weights>", "what happens", "bytes in>", "bytes out>")
        for row in plan["types"]:
            table.add(
                row["type"],
                str(row["tensors"]),
                f"{row['weights']:,}",
                STORAGE_WORDS[row["storage"]].format(**row),
                text.size(row["bytes_in"]),
                text.size(row["bytes_out"]),
            )
        table.show(self._out)
        shards = plan["shards"]
        files = shards[0]["name"] if len(shards) == 1 else f"{len(shards)} shards"
        self._say(f"{sizes(plan['bytes_in'], plan['bundle_bytes'])}, {files}")
        self._say(f"GPU memory: {memory(plan['gpu'])}")
        self._say(f"whole model runs: {runnable(plan['model'])}")
        for line in filter(None, growth(plan)):
            self._out.print(f"note: {printable(line)}", style="yellow", soft_wrap=True)
        if not any(row["storage"] == "planar" for row in plan["types"]):
            self._err.print("note: no tensor of this model can stay packed", style="yellow")

    def result(self, result: Row, plan: Row, source: str) -> None:
        """Print what was done, what it is good for, and which commands come next."""
        if self.quiet:
            return
        table = Table("", "", header=False)
        others = f"{result['tensors_other']} other"
        skipped = f", {result['tensors_skipped']} not stored" if result["tensors_skipped"] else ""
        table.add("bundle", result["output"])
        table.add("tensors", f"{result['tensors_planar']} packed, {others}{skipped}")
        table.add("size", sizes(result["bytes_in"], result["bytes_out"]))
        bits = f"{result['bits_per_weight']:g}"
        if result["bits_per_weight_planar"]:
            bits += f" ({result['bits_per_weight_planar']:g} in packed weights)"
        table.add("bits per weight", bits)
        rate = text.size(result["bytes_in_per_second"])
        table.add("time", f"{text.seconds(result['seconds'])}, {rate}/s")
        table.add("peak memory", text.size(result["peak_memory_bytes"]))
        table.add("GPU memory", memory(plan["gpu"]))
        table.add("whole model runs", runnable(plan["model"]))
        out = shlex.quote(result["output"])
        table.add("look inside", f"q6k-convert inspect {out}")
        table.add("verify next", f"q6k-convert verify {out} --source {shlex.quote(source)}")
        if not plan["model"]["problem"] and not plan["model"]["tokenizer_problem"]:
            table.add("generate", f"q6k-convert generate {out} -p TEXT")
        table.show(self._out)

    def gguf(self, content: Row) -> None:
        """Print the contents of a GGUF, unless the document has them."""
        if self.as_json:
            return
        for file in content["files"]:
            self._say(
                f"{file['name']}: GGUF version {file['version']}, alignment {file['alignment']}, "
                f"{text.size(file['bytes'])}"
            )
        keys = Table("key", "value")
        for key, value in content["keys"].items():
            keys.add(key, readable(value))
        keys.show(self._out)
        tensors = Table("tensor!", "type", "shape", "bytes>")
        for t in content["tensors"]:
            tensors.add(t["name"], t["type"], text.shape(t["shape"]), text.size(t["bytes"]))
        tensors.show(self._out)
        self._totals(content, "bytes_in")

    def bundle(self, content: Row) -> None:
        """Print the contents of a bundle, unless the document has them."""
        if self.as_json:
            return
        self._say(f"{content['path']}: q6k-planar bundle by {content['producer']}")
        table = Table("", "", header=False)
        table.add("architecture", content["architecture"])
        for source in content["sources"]:
            table.add("made from", f"{source['name']}, {text.size(source['bytes'])}, {source['checksum']}")
        table.add("options", ", ".join(f"{k}={v}" for k, v in content["options"].items()))
        for name, to in content["tied"].items():
            table.add("tied", f"{name} is {to}")
        for file in content["files"]:
            table.add("file", f"{file['name']}, {text.size(file['bytes'])}")
        table.add("arrays", f"{text.size(content['bytes'])}, {content['bits_per_weight']:g} bits per weight")
        table.show(self._out)
        self._say(f"GPU memory: {memory(content['gpu'])}")
        tensors = Table("tensor!", "type", "shape", "stored", "bytes>")
        for t in content["tensors"]:
            tensors.add(t["name"], t["type"], text.shape(t["shape"]), t["storage"], text.size(t["bytes"]))
        tensors.show(self._out)
        self._totals(content, "bytes_out")

    def verification(self, report: Row, *, all_tensors: bool) -> None:
        """Print the stages, the tensors (worst first) and the findings."""
        self._say(f"{report['bundle']}: {report['architecture'] or 'no readable manifest'}")
        stages = Table("check", "state", "what")
        for stage in report["stages"]:
            style = {"passed": "green", "failed": "red"}.get(stage["state"], "dim")
            stages.add(stage["stage"], styled(stage["state"], style), stage["detail"])
        stages.show(self._out)
        if any(t["source"] or t["device"] for t in report["tensors"]):
            self._worst_first(report["tensors"], most=None if all_tensors else _WORST)
        if total := report["source_totals"]:
            exact = "every weight is GGUF's own"
            if not total["exact"]:
                exact = f"SNR {decibel(total)} dB over the tensors that are not exact"
            self._say(f"against the source: {exact}; {report['bits_per_weight']:g} bits per weight")
            for row in report["types"]:
                if row["source"] is not None:
                    self._say(f"  {compared(row)}")
            if count := total["nonfinite_scales"]:
                self._say(f"scales of the source that are NaN or infinite: {count:,}")
        if count := report["nonfinite_scales"]:
            self._say(f"scales of the bundle that are NaN or infinite: {count:,}")
        for finding in report["findings"][:_FINDINGS]:
            where = ", ".join(finding[place] for place in ("file", "tensor", "array") if finding[place] is not None)
            self.error(f"{where}: {finding['problem']}")
        if (more := len(report["findings"]) - _FINDINGS) > 0:
            self.error(f"and {more} more; --json lists all")
        if report["status"] == "failed":
            self.error("verification failed", "Make the bundle again from its GGUF file, or fetch it again.")
        else:
            self._out.print("verified", style="bold green")

    def _worst_first(self, tensors: list[Row], most: int | None) -> None:
        def badness(tensor: Row) -> tuple[int, float, float]:
            source, device = tensor["source"] or {}, tensor["device"] or []
            snr = source.get("snr_db")
            error = max((run["worst_error_in_tolerances"] for run in device), default=0.0)
            return (-tensor["findings"], math.inf if snr is None else snr, -error)

        ordered = sorted((t for t in tensors if t["source"] or t["device"]), key=badness)
        table = Table("tensor!", "type", "bits>", "exact", "SNR dB>", "scale err>", "device>")
        for t in ordered[:most]:
            source, device = t["source"] or {}, t["device"] or []
            error = source.get("max_scale_error")
            rates = [run["gb_per_s"] for run in device if run["gb_per_s"] is not None]
            ran = f"{len(device)} runs" + (f", {max(rates):.0f} GB/s" if rates else "")
            table.add(
                t["name"],
                t["type"],
                f"{t['bits_per_weight']:g}",
                {True: "yes", False: "no", None: ""}[source.get("exact")],
                decibel(source),
                "" if error is None else f"{error:.1e}",
                ran if device else "",
            )
        table.show(self._out)
        if len(ordered) > len(table):
            self._say(f"the worst {len(table)} of {len(ordered)} tensors; --all shows every one")

    def examination(self, report: Row) -> None:
        """Print which parts of the machine are ready to run kernels, and how to repair the rest."""
        table = Table("part", "state", "what")
        for finding in report["findings"]:
            style = {"ok": "green", "missing": "red", "broken": "red"}.get(finding["state"], "dim")
            table.add(finding["name"], styled(finding["state"], style), finding["detail"])
        table.show(self._out)
        for finding in report["findings"]:
            if finding["state"] in ("missing", "broken"):
                what = "" if finding["needed"] else ", which kernels run without"
                # A torch for CPUs is there; that only one for CUDA will do has to be in the line.
                part = "torch for CUDA" if finding["name"] == "torch" else finding["name"]
                self.error(f"{part} is {finding['state']}{what}", finding["remedy"])
        if report["status"] == "ok":
            self._out.print("ready to run models on a GPU", style="bold green")
        else:
            others = "converting, verifying and models on a CPU need none"
            self._out.print(f"not ready to run models on a GPU; {others}", style="bold")

    def value(self, key: str, value: Iterator[list[Any]] | Any) -> None:
        """Print the full value of one key; of an array some elements at a time, for it may be long."""
        if not isinstance(value, Iterator):
            self.document({"key": key, "value": value})
            self._say(str(value))
            return
        begin, between, end = (f'{{\n "key": {json_text(key)},\n "value": [\n  ', ",\n  ", "\n ]\n}\n")
        shown = json_text if self.as_json else lambda element: printable(str(element))
        if not self.as_json:
            begin, between, end = "", "\n", "\n"
        for some in value:
            sys.stdout.write(begin + between.join(map(shown, some)))
            begin = between
        sys.stdout.write(end)
        sys.stdout.flush()

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """Show progress over `total` bytes: a bar on a terminal, a line every few seconds elsewhere."""
        if self.quiet:
            yield lambda _: None
        elif sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
                yield lambda count: (bar.update(count), None)[1]
        else:
            yield PlainLines(total, what, self._err).add

    def _say(self, line: str) -> None:
        self._out.print(printable(line), soft_wrap=True)

    def _totals(self, content: Row, column: str) -> None:
        for row in content["types"]:
            stored = f", {STORAGE_WORDS[row['storage']].format(**row)}" if row["storage"] else ""
            self._say(
                f"{row['type']}{stored}: {text.plural(row['tensors'], 'tensor')}, {row['weights']:,} weights, "
                f"{text.size(row[column])}"
            )
