"""A disk that fails while a bundle is verified: the error names the file, whichever stage reads it."""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from bundle_helpers import failed, invoke
from gguf_builder import small_model
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options


class _Failing(io.FileIO):
    """A file whose reads fail, as those of a broken disk do: without a name."""

    def readinto(self, *_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    readall = readinto


@pytest.mark.parametrize(
    "name", ["bundle.json", "model.safetensors.index.json", "metadata.gguf", "model-00001-of-"]
)
@pytest.mark.parametrize("stage", [(), ("--source", "{model}")], ids=["alone", "with its source"])
def test_a_read_that_fails_names_its_file(
    name: str, stage: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model().write(tmp_path / "model.gguf")
    convert(model, tmp_path / "out", Options(max_shard_size=1))
    (broken,) = (path for path in (tmp_path / "out").iterdir() if path.name.startswith(name))
    real_open, real_preadv = io.open, os.preadv

    def opened(file: Any, *args: Any, **more: Any) -> Any:
        if not isinstance(file, int) and os.fspath(file) == str(broken):
            return io.BufferedReader(_Failing(file))
        return real_open(file, *args, **more)

    def preadv(fd: int, *args: Any) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_preadv(fd, *args)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "preadv", preadv)
    result = invoke("verify", tmp_path / "out", *(each.format(model=model) for each in stage))
    failed(result, 4, f"{broken}: Input/output error", "Check the disk")
