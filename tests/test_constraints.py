"""`constraints.txt` fixes the version of everything that is installed, dependencies of dependencies included."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"(#.*|[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+)")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements lead to, as far as they are installed here."""
    found, seen = set[str](), set[tuple[str, frozenset[str]]]()
    todo = [(Requirement(text), frozenset[str]()) for text in requirements]
    while todo:
        requirement, extras = todo.pop()
        wanted = (
            any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)) if requirement.marker else True
        )
        name = canonical(requirement.name)
        key = (name, frozenset(requirement.extras))
        if not wanted or key in seen:
            continue
        seen.add(key)
        try:
            its = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        todo += [(Requirement(text), key[1]) for text in its]
    return found


def test_everything_that_is_installed_is_pinned_once() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    names = [canonical(line.split("==")[0]) for line in lines if not line.startswith("#")]
    assert names == sorted(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    needed = installed([*project["build-system"]["requires"], *(text for group in groups for text in group)])
    # torch for CUDA names the exact versions of these itself.
    of_torch = {name for name in needed if name.startswith(("nvidia-", "cuda-toolkit", "triton"))}
    assert len(needed) > 20
    assert needed - of_torch - set(names) == set()
