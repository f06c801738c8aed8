"""Launches of the choice of tokens on a GPU, `cuda/choose.cuh`; `sampling` and `text_choice` specify it."""

from __future__ import annotations

import struct

from torch import Tensor

from q6k_kernels.cuda.device import Launch, Variant, pointer
from q6k_kernels.generate.step_reference import TokenChoice
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.jit.compiler import Defines

FILE, CHOOSE, CHOOSE_OF_TEXTS = "choose.cuh", "q6k_choose", "q6k_choose_of_texts"
THREADS, VALUES, MOST_BLOCKS = 128, 8, 256
"""Threads of a block, logits that a thread reads at once, and the most blocks; as in `cuda/choose.cuh`."""
_CHOOSE, _CHOOSE_OF_TEXTS = struct.Struct("@PPPPPPPPffi"), struct.Struct("@PPPPPPPPPPPqfi")


def choose(
    launch: Launch,
    macros: Defines,
    shared: tuple[Tensor, Tensor],
    logits: Tensor,
    softcap: float | None,
    choice: TokenChoice,
    suppressed: Tensor | None,
) -> None:
    """Launch the choice of a token, without filters.

    Args:
        launch: launches a kernel.
        macros: those of the dtype.
        shared: what blocks share: candidates, int64 (texts, `MOST_BLOCKS`), and counters, int32 (texts,), 0.
        logits: (1, V).
        softcap: soft cap of the logits, or None.
        choice: the tensors and options.
        suppressed: tokens that must not be chosen, or None.
    """
    given = choice.position, choice.token, choice.chosen, *shared, choice.seed
    arguments = _CHOOSE.pack(
        logits.data_ptr(),
        *(each.data_ptr() for each in given),
        pointer(suppressed),
        softcap or 0.0,
        choice.temperature,
        logits.shape[-1],
    )
    launch((FILE, CHOOSE, macros), (_blocks(logits), 1, 1), THREADS, arguments)


def takes(logits: Tensor) -> bool:
    """Check whether the kernel for several texts takes logits, (M, V), whose rows have to be aligned."""
    return logits.shape[-1] % VALUES == 0


def choose_of_texts(
    launch: Launch,
    macros: Defines,
    shared: tuple[Tensor, Tensor],
    logits: Tensor,
    softcap: float | None,
    choice: TextsChoice,
) -> None:
    """Launch the choice of the next tokens of several texts, without filters; `takes` has accepted the logits."""
    given = choice.places, choice.advances, choice.position, choice.token, choice.chosen, *shared, choice.seed
    arguments = _CHOOSE_OF_TEXTS.pack(
        logits.data_ptr(),
        *(each.data_ptr() for each in given),
        pointer(choice.suppressed),
        pointer(choice.temperature),
        choice.chosen.shape[1],
        softcap or 0.0,
        logits.shape[-1],
    )
    launch((FILE, CHOOSE_OF_TEXTS, macros), (_blocks(logits), len(logits), 1), THREADS, arguments)


def _blocks(logits: Tensor) -> int:
    return min(-(-logits.shape[-1] // (THREADS * VALUES)), MOST_BLOCKS)


def variants(macros: Defines) -> list[Variant]:
    """Return the kernels with the macros of a dtype."""
    return [(FILE, kernel, macros) for kernel in (CHOOSE, CHOOSE_OF_TEXTS)]
