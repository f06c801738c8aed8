"""`save_pretrained` of models that a bundle fills: it writes the bundle again.

transformers would write the packed weights as it finds them, in files that no program reads. A bundle in another
place is the same model, in the same bytes. So weights that were changed since they were loaded cannot be saved:
all are compared with the bundle's before anything is written.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.manifest import FORMAT, BundleError
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.architecture import attached
from q6k_kernels.models.cpu_form import to_bytes
from q6k_kernels.models.filling import Filler
from q6k_kernels.models.ranks import check_whole
from q6k_kernels.models.skeleton import skeleton
from q6k_kernels.weights.byte_layers import ByteLinear
from q6k_kernels.weights.reader import open_bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNSUPPORTED = ("state_dict", "push_to_hub", "variant", "distributed_checkpoint")
_UPLOAD = "Save it to a directory, and upload that: `hf upload ORG/REPO DIRECTORY`."


class Saver:
    """The method `save_pretrained` of one model.

    Args:
        model: a model that a bundle has filled.
        path: directory of the bundle.
    """

    def __init__(self, model: PreTrainedModel, path: Path) -> None:
        self._model, self._path = model, path

    def __call__(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """Write the bundle, `config.json` and `generation_config.json` to a directory; of adapters, these alone.

        Args:
            save_directory: a directory that has no bundle; it is made if it is missing.
            is_main_process: whether to write anything.
            **options: others of transformers; those about how weights are divided into files have no effect.

        Raises:
            UnsupportedModelError: weights were changed since they were loaded, or an option asks for what a bundle
                is not.
            BundleError: the bundle was changed since it was loaded.
            FileExistsError: a file of a bundle is there already.
            OSError: a file cannot be read or written.
        """
        model: Any = self._model
        if getattr(model, "_hf_peft_config_loaded", False):
            type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **options)
            return
        if not is_main_process:
            return
        for name in _UNSUPPORTED:
            if options.get(name):
                raise UnsupportedModelError(f"save_pretrained writes a bundle, which knows no {name}", _UPLOAD)
        if not os.fspath(save_directory):
            raise FileNotFoundError("save_pretrained: the name of the directory is empty. Give one.")
        manifest, to = manifests.read(self._path), Path(save_directory)
        names = (*manifest.files, manifests.NAME)
        if taken := next((to / name for name in names if os.path.lexists(to / name)), None):
            raise FileExistsError(
                f"{taken} exists: save_pretrained replaces no file of a bundle. Give another directory."
            )
        check_whole(model, "be saved")
        self._check_same()
        to.mkdir(parents=True, exist_ok=True)
        for name in manifest.files:
            shutil.copyfile(self._path / name, to / name)
        model.generation_config.save_pretrained(to)
        config = copy.deepcopy(model.config)
        config.architectures, config.quantization_config = [type(model).__name__], self._settings()
        config.save_pretrained(to)
        # Last, as a directory without it is no bundle; what else lay beside the old one is not written.
        bare = manifests.Manifest(**{**vars(manifest), "companions": {}})
        (to / manifests.NAME).write_bytes(manifests.serialize(bare))

    def _settings(self) -> dict[str, Any]:
        """Return how the model was asked to keep its weights, as `config.json` says it."""
        asked: Any = getattr(self._model.config, "quantization_config", None)
        if asked is None:  # `load_model` has no such configuration
            return {"quant_method": FORMAT}
        return dict(asked if isinstance(asked, dict) else asked.to_dict())

    def _check_same(self) -> None:
        """Check that all weights are the bundle's, by loading them again."""
        model, architecture = self._model, attached(self._model)
        if architecture is None:
            raise BundleError(f"{self._path} is not what the model was loaded from")
        bundle = open_bundle(self._path)
        cpu, dtype = torch.device("cpu"), model.dtype
        again = skeleton(bundle, read_metadata(self._path), architecture, dtype)
        joined = self._settings().get("joined", True)
        Filler(again, bundle, architecture, lambda _: cpu, dtype, "auto", lambda _: None, joined=joined).fill()
        if any(isinstance(module, ByteLinear) for module in model.modules()):
            to_bytes(again)
        found, expected = model.state_dict(), again.state_dict()
        for name in {**found, **expected}:
            if name not in found or name not in expected or not _equal(found[name], expected[name]):
                raise UnsupportedModelError(
                    f"{name} is not as in {self._path}: a bundle holds the weights of its GGUF file and no others",
                    "Save adapters by themselves, as PEFT does; `torch.save` keeps a model with changed weights.",
                )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Check that a tensor is one that was loaded to a CPU; logarithms of a GPU have other last bits."""
    if one.is_meta or one.dtype is not other.dtype or one.shape != other.shape:
        return False
    one = one.cpu()
    return torch.equal(one, other) or (one.dtype is torch.float32 and torch.allclose(one, other, rtol=1e-6, atol=0))


def attach_saver(model: PreTrainedModel, path: Path) -> None:
    """Give a model that was filled from a bundle the method that saves it."""
    model.__dict__["save_pretrained"] = Saver(model, path)
