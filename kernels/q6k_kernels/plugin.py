"""The bundle's format among transformers' quantisers, so that `from_pretrained` opens a bundle.

transformers has no entry points for quantisers: one is registered by code that runs after its registry has been
imported. `watch` waits for that, so that neither transformers nor torch is imported before someone else does.
It is called when `q6k_kernels` is imported, and by torch, which calls the entry points of the group
`torch.backends` when it is imported: so programs that know nothing of this package, such as `transformers serve`,
read bundles.
"""

from __future__ import annotations

import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
"""The module that has transformers' registry of quantisers."""


def watch() -> None:
    """Register the quantiser once transformers' registry is imported; at once if it has been."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    try:
        import q6k_kernels.models.quantizer  # noqa: F401 -- importing it registers the quantiser
    except ImportError as error:
        # A program that opens no bundle is to go on, with whatever release of transformers.
        warnings.warn(f"transformers cannot open q6k-planar bundles: {error}", stacklevel=2)


class _Watcher(MetaPathFinder):
    """A finder that finds nothing itself, but for one module wraps the loader that others have found."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that registers the quantiser once its module has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
