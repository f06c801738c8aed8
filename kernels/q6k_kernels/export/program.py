"""Running an exported model in Python, in the same way as the C++ example.

    program = Program("model.pt2")
    logits = program.prefill(ids)
    for token in program.generate(20): ...

It does not need transformers. The operations come from `q6k_kernels.ops.schema`, or from the C++ library if that
is loaded (see `ops.library`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export.pt2_archive._package import load_pt2

from q6k_kernels.errors import ProgramError
from q6k_kernels.export import program_file
from q6k_kernels.export.program_file import Info
from q6k_kernels.ops import schema  # noqa: F401 -- registers the operations that programs call

SLOTS_AT_ONCE = 256
"""Multiple that the slots of a call are rounded up to, so that allocations come in few sizes."""


class Program:
    """An exported model with one text, for one thread at a time.

    Attributes:
        info: the text of the package.
        device: the device that it runs on.
        length: tokens so far.
        state: the tensors of the cache by name.

    Args:
        path: the package; the file must not change while the program is used.
        device: the device; by default the CPU or the current GPU, whichever the package was compiled for.

    Raises:
        ProgramError: the file is not such a package, is damaged, has its own C++ runtime, or was compiled for
            another torch, device or GPU.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str | None = None) -> None:
        file = Path(path)
        self.info, constants = program_file.read(file)
        self.device = _device(file, self.info, device)
        program_file.check_runtime(file)
        index = -1 if self.device.index is None else self.device.index
        # Single-threaded runners: otherwise each call would wait for the device to finish the call before.
        runners = load_pt2(str(file), run_single_threaded=True, device_index=index).aoti_runners
        held = _moved(constants, self.device)
        held |= {
            each.name: torch.zeros(each.shape, dtype=each.dtype, device=self.device) for each in self.info.state
        }
        self._held = held  # the runners do not keep them alive
        for name in program_file.PROGRAMS:
            wanted = runners[name].get_constant_fqns() if name in runners else None
            if wanted is None or (missing := set(wanted) - set(held)):
                what = "is not in it" if wanted is None else f"asks for {', '.join(sorted(missing)[:3])}"
                raise ProgramError(f"{file}: the program {name} {what}", "Export it again.")
            runners[name].load_constants(
                {each: held[each] for each in wanted}, check_full_update=True, user_managed=True
            )
        self._prefill, self._decode = (runners[name] for name in program_file.PROGRAMS)
        self.state = {each.name: held[each.name] for each in self.info.state}
        self.length = 0

    def reset(self) -> None:
        """Forget the text."""
        self.length = 0

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Process the next tokens of the text.

        Args:
            ids: one or more, each below the vocabulary's size.

        Returns:
            Logits of the token after them, float32 (1, V), on the device.

        Raises:
            ValueError: no ids, one outside the vocabulary, or more than the cache has room for.
        """
        size, room = self.info.vocabulary, self.info.capacity - self.length
        if not 1 <= len(ids) <= room or min(ids) < 0 or max(ids) >= size:
            raise ValueError(
                f"ids: expected 1 to {room} of 0 to {size - 1}, found {len(ids)}"
                + (f" of {min(ids)} to {max(ids)}" if ids else "")
            )
        tokens = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        for at in range(0, len(ids), self.info.chunk):
            logits = self._run(tokens[:, at : at + self.info.chunk])
        return logits

    def generate(self, count: int, first: Tensor) -> Iterator[int]:
        """Generate tokens, each the best one, while the cache has room.

        Args:
            count: the most tokens.
            first: logits of the first token, from `prefill`.
        """
        logits = first
        for number in range(count):
            token = logits.argmax(dim=-1, keepdim=True)
            yield int(token)
            if number + 1 < count and self.length < self.info.capacity:
                logits = self._run(token)
            else:
                return

    def _run(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        end = self.length + length
        positions = torch.arange(self.length, end, device=self.device)
        seen = min(-(-end // SLOTS_AT_ONCE) * SLOTS_AT_ONCE, self.info.capacity)
        slots = torch.arange(seen, device=self.device)
        logits: Tensor = (self._decode if length == 1 else self._prefill)(tokens.contiguous(), positions, slots)
        self.length = end
        return logits


def _moved(constants: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move constants to the device; names that share memory share it there, too."""
    moved = dict[tuple[int, torch.dtype, torch.Size], Tensor]()
    found = dict[str, Tensor]()
    for name, constant in constants.items():
        key = constant.data_ptr(), constant.dtype, constant.shape
        if key not in moved:
            moved[key] = constant.to(device)
        found[name] = moved[key]
    return found


def _device(file: Path, info: Info, device: torch.device | str | None) -> torch.device:
    wanted = torch.device(device if device is not None else info.device)
    again = "Export it again, here: `q6k-convert export BUNDLE MODEL.pt2`."
    if wanted.type != info.device:
        raise ProgramError(f"{file}: compiled for {info.device}, and is to run on {wanted}", again)
    here = str(torch.__version__)
    if here.split(".")[:2] != info.compiled_by.split(".")[:2]:
        raise ProgramError(f"{file}: compiled by torch {info.compiled_by}, and this is {here}", again)
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise ProgramError(f"{file}: compiled for a GPU, and torch sees none", again)
        wanted = torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)
        found = torch.cuda.get_device_capability(wanted)
        if found != info.capability:
            expected = ".".join(map(str, info.capability or ()))
            raise ProgramError(
                f"{file}: compiled for compute capability {expected}, {wanted} has {found[0]}.{found[1]}", again
            )
    return wanted
