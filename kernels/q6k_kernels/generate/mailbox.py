"""The queue of tokens from the device, which chooses them, to the host, which reads them in order."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

LAG = 8
"""Steps on a GPU from the start of a step to the reading of its token. So many steps, and those that start together
with the last of them (`recording.TOGETHER`), may have run in vain when a stop token is read."""
STEPS_LAG = 2
"""The same for steps of several texts, which are longer, and of which a text that ends leaves room for another."""


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


class StepsMailbox:
    """The queue of the tokens of steps of several texts, on the CPU, where tokens are available at once.

    Args:
        token: the last tokens by place, int64 (P,), which every step replaces.
    """

    lag = 0

    def __init__(self, token: Tensor) -> None:
        self._token = token
        self._posted = deque[Tensor]()

    def __len__(self) -> int:
        return len(self._posted)

    def post(self) -> None:
        """Note that a step has been started."""
        self._posted.append(self._token.clone())

    def read(self) -> list[int]:
        """Return the tokens of the oldest step that has not been read, by place."""
        tokens: list[int] = self._posted.popleft().tolist()
        return tokens


class GpuStepsMailbox(StepsMailbox):
    """The queue on a GPU: tokens are copied behind their step; only the host waits."""

    lag = STEPS_LAG

    def __init__(self, token: Tensor) -> None:
        super().__init__(token)
        self._arrived = deque[torch.cuda.Event]()

    def post(self) -> None:  # noqa: D102
        host = torch.empty(self._token.shape, dtype=self._token.dtype, pin_memory=True)
        host.copy_(self._token, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._token.device))
        self._arrived.append(arrived)
        self._posted.append(host)

    def read(self) -> list[int]:  # noqa: D102
        self._arrived.popleft().synchronize()
        return super().read()
