"""Tokens on their way from the device that chooses them to the host that reads them, in order."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

LAG = 8
"""Steps on a GPU between one being started and its token being read. As many, and those that are started with the
last of them (`recording.TOGETHER`), may turn out to be too many."""


class Mailbox:
    """Where the device is the host: tokens are there at once.

    Args:
        chosen: int64, the tokens by position; written by the steps.
    """

    lag = 0

    def __init__(self, chosen: Tensor) -> None:
        self._chosen = chosen
        self._posted = deque[int]()

    def post(self, at: int, count: int = 1) -> None:
        """Steps have been started that choose the token at this position and those after it, `count` in all."""
        self._posted.extend(range(at, at + count))

    def read(self) -> int:
        """The oldest token that was posted and not read."""
        return int(self._chosen[self._posted.popleft()])

    def close(self) -> None:
        """Waits until nothing is under way."""


class GpuMailbox(Mailbox):
    """Copies on a stream of their own, beside the steps that go on; only the host waits, for what is steps old."""

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
