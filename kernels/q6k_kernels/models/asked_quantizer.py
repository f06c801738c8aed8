"""A guard around transformers' choice of a quantiser, so that no bundle becomes a model of random weights.

transformers finds a quantiser by `quantization_config` alone. Its classes for any model take
`quantization_config=None`, as many programs pass it, for the bundle's own. Without a quantiser they find none of a
model's names in the files, print a report, and go on with random weights.

Where a model has settings, they ignore those that a caller gives, with a warning. A bundle's settings only say how
it is loaded, so the caller's hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from q6k_kernels.bundle.manifest import FORMAT, is_bundle
from q6k_kernels.errors import UnsupportedModelError

_CHOICE = "get_hf_quantizer"
_MODELS = "transformers.modeling_utils"
"""The module that calls the function, by a name of its own once it is imported."""


def guard(registry: Any, settings_of: Callable[..., Any]) -> None:
    """Guard the function of transformers' registry that chooses a quantiser.

    Args:
        registry: the module.
        settings_of: `PlanarConfig`.
    """
    chosen = guarded(getattr(registry, _CHOICE), settings_of)
    for module in (registry, sys.modules.get(_MODELS)):
        if module is not None:
            setattr(module, _CHOICE, chosen)


def guarded(choose: Callable[..., Any], settings_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return a choice that gives a bundle the quantiser that its `config.json` names, or raises an error.

    Args:
        choose: transformers' function: of a configuration, what the caller says about quantisation, and more.
        settings_of: `PlanarConfig`.
    """

    @wraps(choose)
    def chosen(config: Any, *given: Any, **named: Any) -> Any:
        if getattr(config, "quantization_config", None) is None and (stated := _stated(config)) is not None:
            config.quantization_config = stated
        asked: Any = given[0] if given else named.get("quantization_config")
        if _method(config) == FORMAT and (settings := _settings(asked, settings_of)) is not None:
            config.quantization_config = settings
            given, named = (None, *given[1:]), {**named}
            named.pop("quantization_config", None)
        found = choose(config, *given, **named)
        name = config.name_or_path
        if found[0] is None and not named.get("gguf_file") and name and is_bundle(Path(name)):
            raise UnsupportedModelError(
                f"{name}: config.json of a bundle: quantization_config: expected one with quant_method {FORMAT!r}",
                "Move config.json away and write it again: `q6k-convert hf OUT/`.",
            )
        return found

    return chosen


def _settings(asked: Any, settings_of: Callable[..., Any]) -> dict[str, Any] | None:
    """Return what a caller says about a bundle, in a `PlanarConfig` or its fields; None if it is of another format.

    transformers takes fields only for models that are not quantised yet.

    Raises:
        UnsupportedModelError: a field is unknown.
    """
    if isinstance(asked, dict) and asked.get("quant_method", FORMAT) == FORMAT:
        asked = settings_of(**asked)
    return asked.to_dict() if getattr(asked, "quant_method", None) == FORMAT else None


def _method(config: Any) -> Any:
    """Return the name of the format that a configuration's weights have, if they are quantised."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)


def _stated(config: Any) -> dict[str, Any] | None:
    """Return what `config.json` says about quantisation, if it is that of a bundle."""
    try:
        content, _ = type(config).get_config_dict(config.name_or_path or "", local_files_only=True)
    except OSError:  # there is no such file, as of a configuration that was made by hand
        return None
    stated: dict[str, Any] = content.get("quantization_config") or {}
    return stated if stated.get("quant_method") == FORMAT else None
