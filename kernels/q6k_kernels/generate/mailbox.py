"""The queue of tokens from the device, which chooses them, to the host, which reads them in order."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

LAG = 8
"""Steps on a GPU from the start of a step to the reading of its token. So many steps, and those that start together
with the last of them (`recording.TOGETHER`), may have run in vain when a stop token is read."""


class Mailbox:
    """The queue on the CPU, where tokens are available at once.

    Args:
        chosen: the tokens by position, int64; the steps write it.
    """

    lag = 0

    def __init__(self, chosen: Tensor) -> None:
        self._chosen = chosen
        self._posted = deque[int]()

    def post(self, at: int, count: int = 1) -> None:
        """Note that steps have been started that choose `count` tokens, the first at this position."""
        self._posted.extend(range(at, at + count))

    def read(self) -> int:
        """Return the oldest posted token that has not been read."""
        return int(self._chosen[self._posted.popleft()])

    def close(self) -> None:
        """Wait until all copies are complete."""


class GpuMailbox(Mailbox):
    """The queue on a GPU: tokens are copied on a separate stream beside the steps; only the host waits."""

    lag = LAG

    def __init__(self, chosen: Tensor) -> None:
        super().__init__(chosen)
        self._host = torch.zeros(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        self._stream = torch.cuda.Stream(chosen.device)  # type: ignore[no-untyped-call]
        self._arrived = deque[torch.cuda.Event]()

    def post(self, at: int, count: int = 1) -> None:  # noqa: D102
        super().post(at, count)
        self._stream.wait_stream(torch.cuda.current_stream(self._chosen.device))
        with torch.cuda.stream(self._stream):
            self._host[at : at + count].copy_(self._chosen[at : at + count], non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._arrived.extend([arrived] * count)

    def read(self) -> int:  # noqa: D102
        self._arrived.popleft().synchronize()
        return int(self._host[self._posted.popleft()])

    def close(self) -> None:  # noqa: D102
        self._stream.synchronize()
