"""Plan a conversion before it starts: the storage of every tensor, and the place of every array."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from q6k_convert import text
from q6k_convert.errors import InputRejectedError, UsageError
from q6k_kernels.bundle.shards import ArraySpec, Shard, plan_shards
from q6k_kernels.bundle.storage import PLAIN_DTYPES, Storage, arrays_of
from q6k_kernels.formats.ggml import UnknownType, dequantizes
from q6k_kernels.formats.types import PACKED_TYPES, Scales, row_of
from q6k_kernels.gguf.file import GGUFFile
from q6k_kernels.gguf.model import GGUFModel
from q6k_kernels.gguf.tensors import TensorRecord
from q6k_kernels.text import listing

Other = Literal["bf16", "raw", "skip", "error"]

MAX_PATTERNS, MAX_PATTERN = 1000, 1000
"""Limits of the patterns of `--include` and `--exclude`, and of the characters of each."""
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """Options that decide what a bundle contains; its manifest records them.

    Attributes:
        scales: the weight type of a GGML type that has two: "bf16" (d * sub-scale, rounded) or "exact" (GGUF's
            own sub-scales and d).
        other: how to store quantised tensors that are not packed: their GGML type has no weight type, or they
            are no matrices.
        include, exclude: shell patterns on tensor names; a tensor is stored if it matches an include
            pattern (or there are none) and no exclude pattern.
        max_shard_size: most data bytes in a shard.
        allow_nonfinite: keep blocks with a scale that is NaN or infinite instead of rejecting the file.
    """

    scales: Scales = "bf16"
    other: Other = "bf16"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_shard_size: int = DEFAULT_SHARD_BYTES
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        """Bound the patterns, each of which is compared with every tensor's name.

        Raises:
            UsageError: there are too many, or one is too long.
        """
        patterns = (*self.include, *self.exclude)
        if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN for pattern in patterns):
            raise UsageError(
                f"--include and --exclude: {len(patterns)} patterns; at most {MAX_PATTERNS} are taken, of at most "
                f"{MAX_PATTERN} characters",
                "Use * in fewer patterns.",
            )

    def recorded(self) -> dict[str, Any]:
        """Return the options as the manifest records them."""
        return {
            "scales": self.scales,
            "other": self.other,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "max_shard_size": self.max_shard_size,
            "allow_nonfinite": self.allow_nonfinite,
        }

    @classmethod
    def of_record(cls, recorded: Mapping[str, Any]) -> Options:
        """Return the options that a manifest records.

        Raises:
            ValueError: they are not those of a conversion.
        """
        default = cls().recorded()
        # A boolean is a number, too, but not here.
        if [(name, type(value)) for name, value in recorded.items()] != [(n, type(v)) for n, v in default.items()]:
            raise ValueError(f"expected {', '.join(default)}, each of its type, found {dict(recorded)!r:.200}")
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in recorded.items()}
        made = cls(**values)
        for name, value, known in (
            ("scales", made.scales, get_args(Scales)),
            ("other", made.other, get_args(Other)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r:.80}")
        if made.max_shard_size < 1:
            raise ValueError(f"max_shard_size: expected at least 1, found {made.max_shard_size}")
        return made


@dataclass(frozen=True)
class TensorPlan:
    """Storage of one tensor: its weight type if it is packed, and its arrays by role (ql, qh, …; or data)."""

    part: GGUFFile
    record: TensorRecord
    storage: Storage
    format: str | None = None
    arrays: dict[str, ArraySpec] = field(default_factory=dict)

    @property
    def bytes_out(self) -> int:
        """Bytes of the tensor's arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Plan:
    """A conversion ready to run: the open model, the options, the storage of every tensor, and the shards."""

    model: GGUFModel
    options: Options
    tensors: list[TensorPlan]
    shards: list[Shard]

    @property
    def bytes_in(self) -> int:
        """Bytes to read: the whole source, because its checksum covers all of it."""
        return self.model.size

    @property
    def bytes_out(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def tied(self) -> dict[str, str]:
        """Names of absent tensors -> names of those that take their place."""
        return {"output.weight": "token_embd.weight"} if self.model.is_tied() else {}

    @property
    def bundle_bytes(self) -> int:
        """Bytes of the bundle: the shards and the key-value pairs; only index and manifest come on top."""
        return self.bytes_out + sum(part.kv_range[1] for part in self.model.parts)


def make_plan(model: GGUFModel, options: Options) -> Plan:
    """Decide how every tensor is stored.

    Raises:
        InputRejectedError: `other` is "error", and the model has tensors that it applies to; or it has no tensors.
        GgufRejectedError: a tensor cannot be stored as the options ask, or two arrays would have the same name.
        UsageError: a pattern matches no tensor, no tensor is left to store, or there would be too many shards.
    """
    if next(model.tensors(), None) is None:
        keys = text.plural(sum(1 for _ in model.key_values()), "key")
        raise InputRejectedError(
            f"{model.parts[0].path}: holds no tensors, only {keys}",
            "It is a vocabulary or other metadata: give the file that holds the model's weights.",
        )
    selected = _selection([record.name for _, record in model.tensors()], options)
    tensors = list[TensorPlan]()
    refused = list[str]()
    for part, record in model.tensors():
        storage = _storage(record, options.other) if record.name in selected else "skipped"
        if storage is None:
            refused.append(f"{record.name} ({record.type.name} {text.shape(record.shape)})")
            continue
        if storage != "skipped" and isinstance(record.type, UnknownType):
            raise part.reject(
                f"tensor {record.name!r}",
                record.type.problem,
                record.record_at,
                remedy=f"{record.type.remedy}; --other skip or --exclude leaves such tensors out.",
            )
        if storage == "dequantized":
            _check_dequantizer(part, record)
        format = row_of(record.type.name, options.scales).name if storage == "planar" else None
        arrays = arrays_of(record.name, record.type.name, record.shape, storage, format)
        tensors.append(TensorPlan(part, record, storage, format, arrays))
    if refused:
        raise InputRejectedError(
            f"{model.parts[0].path}: tensors: {len(refused)} that are neither packed nor stored unchanged: "
            f"{listing(refused, most=5)}",
            "Use --other bf16, raw or skip to say how to store them, or --exclude them.",
        )
    if not any(tensor.arrays for tensor in tensors):
        raise UsageError(
            f"{model.parts[0].path}: none of its {len(tensors)} tensors would be stored",
            "Check --include, --exclude and --other; `q6k-convert inspect` lists the tensors.",
        )
    _check_keys(tensors)
    try:
        shards = plan_shards([list(t.arrays.values()) for t in tensors if t.arrays], options.max_shard_size)
    except ValueError as error:
        raise UsageError(str(error), "Give a larger --max-shard-size.") from error
    return Plan(model, options, tensors, shards)


def _selection(names: Sequence[str], options: Options) -> set[str]:
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"{option} {pattern!r} matches none of the {len(names)} tensors",
                    "`q6k-convert inspect` lists their names; quote patterns against the shell.",
                )
    return {
        name
        for name in names
        if (not options.include or _matches(name, options.include)) and not _matches(name, options.exclude)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _storage(record: TensorRecord, other: Other) -> Storage | None:
    """Return how a selected tensor is stored; None if `--other error` forbids it."""
    if record.type.name in PACKED_TYPES and len(record.shape) in (2, 3) and record.weights:
        return "planar"
    if record.type.name in PLAIN_DTYPES:
        return "plain"
    by_option: dict[Other, Storage | None] = {
        "bf16": "dequantized", "raw": "raw", "skip": "skipped", "error": None
    }  # fmt: skip
    return by_option[other]


def _check_dequantizer(part: GGUFFile, record: TensorRecord) -> None:
    """Check that the gguf package can dequantise the tensor's type.

    Raises:
        GgufRejectedError: it cannot.
    """
    if not dequantizes(record.type.name):
        raise part.reject(
            f"tensor {record.name!r}",
            f"the gguf package has no dequantiser for {record.type.name}",
            record.record_at,
            remedy="Use --other raw to store its blocks unchanged, or --exclude it.",
        )


def _check_keys(tensors: Sequence[TensorPlan]) -> None:
    owners = dict[str, TensorPlan]()
    for tensor in tensors:
        for array in tensor.arrays.values():
            other = owners.setdefault(array.key, tensor)
            if other is not tensor:
                raise tensor.part.reject(
                    f"tensor {tensor.record.name!r}",
                    f"its array {array.key!r} would have the name of one of tensor {other.record.name!r}",
                    tensor.record.record_at,
                    remedy="--exclude one of the two.",
                )
