"""Run without coverage what takes as long again with it: torch's tracing and compiling, and long plans."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import wraps
from typing import Any

import pytest
import torch


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, to run in a thread that nothing traces.

    Switching the tracer off and on in its own thread would make coverage take lines of one file for another's.
    """

    @wraps(function)
    def wrapped(*arguments: Any, **more: Any) -> Any:
        gradients = torch.is_grad_enabled()

        def call() -> Any:
            with torch.set_grad_enabled(gradients):
                return function(*arguments, **more)

        tracing = threading.gettrace()
        threading.settrace(None)  # type: ignore[arg-type]
        try:
            with ThreadPoolExecutor(1) as thread:
                done = thread.submit(copy_context().run, call)
                return done.result()
        finally:
            threading.settrace(tracing)  # type: ignore[arg-type]

    return wrapped


@contextmanager
def untraced_export() -> Iterator[None]:
    """Export and compile untraced in the meantime; the code around, which is ours, is traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", untraced(torch.export.export))
        for name in ("aot_compile", "aoti_compile_and_package"):
            patch.setattr(torch._inductor, name, untraced(getattr(torch._inductor, name)))
        yield
