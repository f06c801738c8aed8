"""How tokens are drawn and what ends an answer: what the command line asks for, else what the file states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q6k_convert.errors import UsageError
from q6k_convert.run.running import Cache
from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.bundle.stated_sampling import stated_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from q6k_kernels.generate.generator import Generator

WHOLE_TEXT = -1
"""As the number of last tokens that are penalised."""
_WORDS = {
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
    "repeat_penalty": "repeat-penalty",
    "repeat_last": "repeat-last",
}
_DEFAULTS: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "repeat_last": WHOLE_TEXT,
}
"""Settings where neither the command line nor the file has one."""


@dataclass(frozen=True)
class SamplingRequest:
    """What the command line asks for, see its options; None for what it leaves to the file."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Sampling:
    """The settings that hold.

    Attributes:
        settings: each setting by its name, as the documents of the commands have them.
        request: what was asked for.
    """

    settings: dict[str, Any]
    request: SamplingRequest

    def generator(self, model: PreTrainedModel, capacity: int, cache_type: Cache = "model") -> Generator:
        """Make a generator that draws by these settings."""
        from q6k_kernels.generate.generator import Generator

        drawing, logprobs = drawn_by(self.settings), self.request.logprobs
        return Generator(model, capacity=capacity, logprobs=logprobs, cache_type=cache_type, **drawing)


def drawn_by(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as a generator takes them: `temperature`, `seed` and `filters`."""
    from q6k_kernels.generate.filters import Filters

    rest = dict(settings)
    temperature, seed, last = (rest.pop(name) for name in ("temperature", "seed", "repeat_last"))
    filters = Filters(**rest, repeat_last=None if last == WHOLE_TEXT else last)
    return {"temperature": temperature, "seed": seed, "filters": filters}


def settled(request: SamplingRequest, metadata: Metadata, note: Callable[[str], None]) -> Sampling:
    """Return the settings that hold, and say which of them the file decided.

    Raises:
        UsageError: a stop text is empty.
        BundleError: the file states a setting that is out of its range.
    """
    if not all(request.stop):
        raise UsageError("--stop: a stop text is empty", "Give one with a character or more, or leave it out.")
    stated = stated_sampling(metadata)
    asked = {name: value for name in _DEFAULTS if (value := getattr(request, name)) is not None}
    used = {name: value for name, value in stated.stated.items() if name not in asked and value != _DEFAULTS[name]}
    if used:
        words = ", ".join(f"{_WORDS[name]} {value:.7g}" for name, value in used.items())
        note(f"sampling as the file states: {words}; options override it")
    if stated.not_built:
        note(f"note: the file asks for {', '.join(stated.not_built)}, which is not built")
    return Sampling({**_DEFAULTS, **stated.stated, **asked, "seed": request.seed}, request)
