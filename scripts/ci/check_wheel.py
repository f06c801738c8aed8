"""Check an installed q6k-convert: convert a small file of every weight type, verify the bundle, list what is in it.

It takes neither torch nor a compiler, and runs in the Python in which q6k-convert is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from q6k_convert import __version__
from q6k_convert.convert.repack import best_path
from q6k_kernels.formats.types import WEIGHT_TYPES

ROWS, K = 32, 256


def write_model(path: Path) -> int:
    """Write a GGUF file with a tensor of each weight type, all of scales that are finite; return their number."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    names = dict.fromkeys(row.ggml for row in WEIGHT_TYPES.values())
    for name in names:
        kind = gguf.GGMLQuantizationType[name]
        weights, bytes_each = gguf.GGML_QUANT_SIZES[kind]
        # Bytes below 64 make small finite numbers of one or two of them, wherever a type has its scales.
        blocks = random.integers(0, 64, (ROWS, K // weights * bytes_each), dtype=np.uint8)
        writer.add_tensor(f"{name.lower()}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(names)


def main() -> None:
    """Run the commands, each of which must succeed."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder) / "model.gguf", Path(folder) / "out"
        tensors = write_model(model)
        for command in (
            [model, out, "--scales", "exact", "--quiet"],
            ["verify", out, "--source", model, "--quiet"],
            ["inspect", out],
        ):
            run = [sys.executable, "-m", "q6k_convert", *map(str, command)]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"q6k-convert {__version__}, Python {version}, {best_path()}: {tensors} weight types converted and verified"
    )


if __name__ == "__main__":
    main()
