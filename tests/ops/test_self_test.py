"""The kernels' own test, with the operations on the CPU: it passes, and it can fail."""

from __future__ import annotations

import re
from typing import Any

import pytest

from q6k_kernels.errors import CompilerMissingError
from q6k_kernels.formats.types import WEIGHT_TYPES

torch = pytest.importorskip("torch")

from q6k_kernels.ops import self_test


def test_the_operations_pass_their_test() -> None:
    checks = self_test.run("cpu")
    assert len(checks) == 6 * len(WEIGHT_TYPES)
    assert [check for check in checks if not check.passed] == []


class Wrong:
    """The operations, one of them a little wrong."""

    def __init__(self, name: str, how: Any) -> None:
        self.name, self.how = name, how

    def __getattr__(self, name: str) -> Any:
        right = getattr(OPERATIONS, name)
        return (lambda *arguments: self.how(right(*arguments))) if name == self.name else right


OPERATIONS = torch.ops.q6k


def one_ulp(x: Any) -> Any:
    x = x.clone()
    x.view(torch.int16)[-1, -1] += 2
    return x


def refuse(_: Any) -> None:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("name", "how", "failing", "detail"),
    [
        ("linear", one_ulp, 3, r"ArithmeticError: y\[\d+, 274\] is \S+, expected \S+"),
        ("dequantize", one_ulp, 1, r"ArithmeticError: element \(274, 511\) is \S+, expected \S+"),
        ("embedding", one_ulp, 1, r"ArithmeticError: element \(6, 511\) is"),
        ("embedding", lambda x: x[1:], 1, r"expected torch.bfloat16 \(7, 512\), found torch.bfloat16 \(6, 512\)"),
        ("dequantize", lambda x: x.float(), 1, "expected torch.bfloat16 .*, found torch.float32"),
        ("pack", refuse, 1, "RuntimeError: no kernel image is available"),
        ("linear", refuse, 3, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_operation_fails_its_test(
    name: str, how: Any, failing: int, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "q6k", Wrong(name, how))
    wrong = [check for check in self_test.run("cpu") if not check.passed]
    assert [check.name.split(",")[0] for check in wrong] == [name] * failing * len(WEIGHT_TYPES)
    assert all(re.search(detail, check.detail) for check in wrong), wrong


@pytest.mark.parametrize("name", ["pack", "dequantize", "embedding", "linear"])
def test_an_error_that_is_no_kernels_fault_is_not_a_checks_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Any) -> None:
        raise CompilerMissingError("NVRTC was not found", "Install it.")

    monkeypatch.setattr(torch.ops, "q6k", Wrong(name, missing))
    with pytest.raises(CompilerMissingError, match="Install it"):
        self_test.run("cpu")
