"""Measure how fast a bundle's model processes prompts and decodes, in the tests of llama-bench."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import UsageError
from q6k_convert.run.running import described, name_of
from q6k_convert.run.session import ModelRequest, Note, Progress, Session
from q6k_kernels.bundle import manifest as manifests

if TYPE_CHECKING:
    from q6k_kernels.bundle.metadata import Metadata
    from q6k_kernels.generate.generator import Generator

Row = dict[str, Any]
_STEP = 128
"""Step of the cache's capacity: attention kernels are faster on whole tiles of slots."""


@dataclass(frozen=True)
class BenchRequest:
    """Request of the command; see its options."""

    model: ModelRequest
    prompts: tuple[int, ...] = (512,)
    answers: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5


def run(request: BenchRequest, note: Note, progress: Progress) -> Row:
    """Measure all tests, and return the document for `--json`.

    Args:
        request: request of the command.
        note: called with each line about the progress.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        UsageError: there is nothing to measure, or a text would be longer than the model knows.
        Q6KConvertError, ModelError, BundleError, OSError: see `Session`.
    """
    lengths = [(count, 0) for count in request.prompts if count] + [
        (0, count) for count in request.answers if count
    ]
    tests = [(*each, depth) for depth in request.depths for each in lengths]
    if not tests:
        raise UsageError("there is nothing to measure", "Give a length: -p N of prompts, or -n N of answers.")
    session = Session(request.model, "measuring", note)
    # Decoding begins behind one token at least, and its last token is not an input.
    needed = max(prompt + (1 + answer if answer else 0) + depth for prompt, answer, depth in tests)
    known = session.metadata.context_length
    if known is not None and needed > known:
        raise UsageError(f"a test needs {needed} positions, and the model knows {known}", "Give shorter lengths.")
    capacity = -(-needed // _STEP) * _STEP
    model = session.model(capacity, progress)
    from q6k_kernels.generate.generator import Generator

    generator = Generator(model, capacity=capacity, cache_type=request.model.cache)
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.num_embeddings
    rows = list[Row]()
    for prompt, answer, depth in tests:
        name = f"pp{prompt}" if prompt else f"tg{answer}"
        row: Row = {"test": f"{name} @ d{depth}" if depth else name}
        row |= {"n_prompt": prompt, "n_gen": answer, "n_depth": depth}
        note(f"measuring {row['test']}, {text.plural(request.repetitions, 'time')}")
        rows.append(row | _measured(generator, vocabulary, prompt, answer, depth, request.repetitions))
    return {
        "status": "done",
        "bundle": str(request.model.bundle),
        "model": model_name(session.manifest, session.metadata),
        "size_bytes": sum(tensor.nbytes for tensor in session.manifest.tensors),
        "parameters": parameters(session.manifest),
        "backend": "CUDA" if session.device.type == "cuda" else "CPU",
        "device": described(session.device),
        "dtype": name_of(session.dtype),
        "activations": request.model.activations,
        "cache": request.model.cache,
        "fused": generator.fused,
        "repetitions": request.repetitions,
        "tests": rows,
    }


def table(document: Row) -> str:
    """Return the results as a table in Markdown."""
    size, count = document["size_bytes"] / 2**30, document["parameters"]
    billions = count >= 1e9
    shared = (
        document["model"],
        f"{size:.2f} GiB" if size >= 1 else f"{size * 1024:.2f} MiB",
        f"{count / 1e9:.2f} B" if billions else f"{count / 1e6:.2f} M",
        document["backend"],
    )
    heads = ("model", "size", "params", "backend", "test", "t/s")
    rows = [(*shared, row["test"], f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}") for row in document["tests"]]
    widths = [max(len(cells[i]) for cells in (heads, *rows)) for i in range(len(heads))]
    left = (0, 3)
    lines = [
        " | ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(cells, widths, strict=True)) for cells in (heads, *rows))
    ]
    rule = " | ".join("-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def model_name(manifest: manifests.Manifest, metadata: Metadata) -> str:
    """Return a model's architecture, size and mix of weight types, as far as the file states them."""
    import gguf

    label = metadata.string("general.size_label")
    number = metadata.integer("general.file_type")
    kinds = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    mix = kinds.get(number) if number is not None else None
    if mix is None:  # that of the most weights
        weights = dict[str, int]()
        for tensor in manifest.tensors:
            weights[tensor.type] = weights.get(tensor.type, 0) + math.prod(tensor.shape)
        mix = max(weights, key=lambda kind: weights[kind], default=None)
    return " ".join(part for part in (metadata.architecture, label, mix) if part)


def parameters(manifest: manifests.Manifest) -> int:
    """Return the number of weights that a bundle holds."""
    return sum(math.prod(tensor.shape) for tensor in manifest.tensors)


def _measured(generator: Generator, vocabulary: int, prompt: int, answer: int, depth: int, repetitions: int) -> Row:
    from q6k_convert.run.speed import decoding, prompting, random_ids, times_of

    before = random_ids(depth, vocabulary)
    if prompt:
        work, prepare = prompting(generator, random_ids(prompt, vocabulary), before)
    else:
        work, prepare = decoding(generator, before or random_ids(1, vocabulary), answer)
    for _ in range(2 if generator.device.type == "cuda" else 1):  # compiles and records; not counted
        prepare()
        work()
    times = times_of(work, prepare, repetitions, generator.device)
    rates = [1e3 * (prompt or answer) / ms for ms in times.ms]
    return {
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "samples_ts": rates,
    }
