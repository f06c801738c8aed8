"""Loading from a bundle: one tensor at a time, straight to the device that uses it.

    bundle = open_bundle("out/")
    weight = bundle.load("blk.0.attn_q.weight", "cuda")    a PackedWeight
    norm = bundle.load("blk.0.attn_norm.weight", "cuda")   a Tensor
    everything = bundle.load_all("cuda")

Opening reads the manifest and the shards' headers, and checks them (see `bundle.manifest` and
`bundle.structure`); no array is read before it is asked for, and no file stays open. Planes are packed on the
device that they are loaded to, some rows at a time, so that loading takes little memory beside the weight itself.
Contents are not compared with their checksums: `q6k-convert verify` does that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.manifest import METADATA_NAME, BundleError, Manifest, StoredTensor
from q6k_kernels.bundle.published import directory_of
from q6k_kernels.bundle.structure import Entry, check_structure, read_header
from q6k_kernels.formats.types import weight_type
from q6k_kernels.weights.transfer import Arrays, Piece, Staging, Stamp, load_plain, load_planar, stamp, way_to
from q6k_kernels.weights.weight import PackedWeight


class NotLoadableError(ValueError):
    """A tensor has no form in the bundle that can be loaded; the message says how to convert it otherwise."""


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle for loading.

    Args:
        path: the bundle's directory, or the name of one on the Hugging Face Hub, ORG/REPO or ORG/REPO@REVISION.

    Raises:
        BundleError: it is no bundle, or its files break a rule of the format; the message says which.
        OSError: a file cannot be read.
    """
    directory = directory_of(path)
    manifest = manifests.read(directory)
    # Taken before the headers are read, so that any later change of a file is found.
    shards = [name for name in manifest.files if name.endswith(".safetensors") and (directory / name).is_file()]
    stamps = {name: stamp((directory / name).stat()) for name in shards}
    if findings := check_structure(directory, manifest):
        more = f" (and {len(findings) - 1} more: see `q6k-convert verify`)" if len(findings) > 1 else ""
        raise BundleError(f"{directory}: {findings[0]}{more}")
    entries = {name: read_header(directory / name) for name in shards}
    return Bundle(directory, manifest, entries, stamps)


class Bundle:
    """A bundle that is open for loading, its tensors by GGUF name; made by `open_bundle`.

    Attributes:
        path: the bundle's directory.
        manifest: the content of `bundle.json`.
        names: names of all tensors, in the order of their data, then those tied to another.
        tied: name -> name of the tensor loaded in its place, such as the embedding for a tied head.
        metadata_path: a GGUF file with the model's key-value pairs, and no tensors.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        entries: dict[str, dict[str, Entry]],
        stamps: dict[str, Stamp],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.tied = dict(manifest.tied)
        self.names = (*(tensor.name for tensor in manifest.tensors), *self.tied)
        self.metadata_path = path / METADATA_NAME
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._entries = entries
        self._stamps = stamps

    def __repr__(self) -> str:
        return f"Bundle('{self.path}', {self.manifest.architecture}, {len(self)} tensors)"

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self.tied

    def info(self, name: str) -> StoredTensor:
        """Return the manifest's entry of a tensor; for a tied name, that of the tensor loaded in its place.

        Raises:
            KeyError: there is no tensor of this name.
        """
        try:
            return self._tensors[self.tied.get(name, name)]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}; `names` lists its {len(self)}") from None

    def load(
        self, name: str, device: torch.device | str | int = "cpu", *, expert: int | None = None
    ) -> PackedWeight | Tensor:
        """Read one tensor.

        Each call reads it anew. A tied name loads the tensor that it is tied to; `load_all` returns one object for
        both names. For many tensors `loader` is faster on a GPU.

        Args:
            name: GGUF name of the tensor.
            device: the CPU or a CUDA GPU.
            expert: index, 0..E-1, of the only weight (N, K) to read from a stack (E, N, K).

        Returns:
            A PackedWeight if the tensor is packed, else a Tensor of the stored dtype, in torch's order of dims. On
            a GPU it is ready for the current stream.

        Raises:
            KeyError: there is no tensor of this name.
            IndexError: there is no such expert.
            NotLoadableError: it is stored as raw GGUF blocks, or not at all.
            BundleError: a file has changed since the bundle was opened, or ends too early.
            ValueError: the device is of another kind, or `expert` is given for no stack of packed weights.
            OSError: a file cannot be read.
        """
        return self.loader(device)(name, expert=expert)

    def loader(self, device: torch.device | str | int = "cpu") -> Loader:
        """Return a loader that reads tensor after tensor to one device.

        Args:
            device: the CPU or a CUDA GPU.

        Raises:
            ValueError: the device is of another kind.
        """
        return Loader(self, way_to(device))

    def _load(
        self, name: str, staging: Staging | None, expert: int | None, piece: Piece | None
    ) -> PackedWeight | Tensor:
        tensor = self.info(name)
        if tensor.storage == "raw":
            raise NotLoadableError(
                f"{tensor.name} is stored as raw GGUF blocks of {tensor.type}, which are not unpacked here: "
                f"convert the model with --other bf16"
            )
        if tensor.storage == "skipped":
            raise NotLoadableError(
                f"{tensor.name} ({tensor.type}) was left out of the bundle: convert the model with --other bf16, "
                f"without --exclude, and with an --include that names it, if any"
            )
        _check_expert(tensor, expert)
        _check_piece(tensor, piece)
        with ExitStack() as files:
            arrays = Arrays(self.path, tensor, self._entries, self._stamps, files)
            if expert is not None:
                return load_planar(arrays, tensor, Piece(expert, expert + 1), staging)[0]
            load = load_planar if tensor.storage == "planar" else load_plain
            return load(arrays, tensor, piece, staging)

    def load_all(
        self, device: torch.device | str | int = "cpu", names: Iterable[str] | None = None
    ) -> dict[str, PackedWeight | Tensor]:
        """Read many tensors; tied names get the same object.

        Args:
            device: the CPU or a CUDA GPU.
            names: names of the tensors; all by default.

        Raises:
            As `load`; by default also if any tensor of the bundle cannot be loaded.
        """
        load = self.loader(device)
        loaded = dict[str, PackedWeight | Tensor]()
        found = dict[str, PackedWeight | Tensor]()
        for name in self.names if names is None else names:
            stored = self.info(name).name
            if stored not in loaded:
                loaded[stored] = load(stored)
            found[name] = loaded[stored]
        return found


class Loader:
    """Reader of a bundle's tensors to one device; made by `Bundle.loader`.

    To a GPU all tensors go through the same page-locked memory, 64 MB, which the loader keeps. The first bytes of a
    tensor are read while the last bytes of the one before are copied.
    """

    def __init__(self, bundle: Bundle, staging: Staging | None) -> None:
        self._bundle, self._staging = bundle, staging

    def __call__(
        self, name: str, *, expert: int | None = None, piece: Piece | None = None
    ) -> PackedWeight | Tensor:
        """Read one tensor, as `Bundle.load` does, or a piece of it.

        Args:
            name: GGUF name of the tensor.
            expert: index of the only weight to read from a stack.
            piece: rows and columns of a matrix, numbers of a vector, or experts of a stack to read. Columns of a
                packed matrix begin and end with blocks.

        Raises:
            ValueError: there is no such piece; all others as by `Bundle.load`.
        """
        return self._bundle._load(name, self._staging, expert, piece)


def _check_expert(tensor: StoredTensor, expert: int | None) -> None:
    if expert is None:
        return
    if tensor.storage != "planar" or len(tensor.shape) != 3:
        raise ValueError(
            f"expert: {tensor.name} is no stack of packed weights, it is {tensor.storage} of shape {tensor.shape}"
        )
    if not 0 <= expert < tensor.shape[0]:
        raise IndexError(f"expert: {tensor.name} has 0 to {tensor.shape[0] - 1}, found {expert}")


def _check_piece(tensor: StoredTensor, piece: Piece | None) -> None:
    if piece is None:
        return
    shape = tuple(tensor.shape)
    begin, end = piece.columns or (0, 1)
    of_columns = shape[-1] if len(shape) == 2 else 0 if piece.columns else 1
    block = weight_type(tensor.format).block if tensor.format and piece.columns else 1
    if not (0 <= piece.begin < piece.end <= (*shape, 0)[0] and 0 <= begin < end <= of_columns):
        raise ValueError(f"piece: {tensor.name} has the shape {shape}, found {piece}")
    if begin % block or end % block:
        raise ValueError(f"piece: columns of {tensor.name} begin and end at multiples of {block}, found {piece}")
