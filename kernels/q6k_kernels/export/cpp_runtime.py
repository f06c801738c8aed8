"""The C++ runtime of compiled programs, which has to be torch's: the shared libstdc++.so.6.

Some compilers copy libstdc++.a into each library that they link: those without a shared libstdc++, as in some
containers, and any with -static-libstdc++. Two runtimes in one process share only some of their variables.
AOTInductor's programs parse the name of their device with std::regex while they load. With a copy of the runtime,
that fails with std::bad_cast or a segmentation fault, whatever the program computes.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from q6k_kernels.errors import ExportFailedError

RUNTIME = "libstdc++.so.6"
_NEEDED = (f"{RUNTIME}\0".encode(), b"libc++.so.1\0")
"""Shared runtimes that an ELF file may need; libc++ is safe, as it shares no variable with torch's runtime."""
_SOURCE = "#include <iostream>\nvoid q6k_probe(int value) { std::cout << value; }\n"


def is_shared(library: bytes) -> bool:
    """Check whether a shared library, given as the content of its file, uses a shared C++ runtime and no copy."""
    return any(name in library for name in _NEEDED)


def link_options() -> dict[str, Any]:
    """Return the options that make AOTInductor link torch's runtime; most compilers need none.

    Raises:
        ExportFailedError: the compiler cannot link a library to the shared runtime.
        torch._inductor.exc.InvalidCxxCompiler: there is no compiler.
    """
    from torch._inductor import cpp_builder

    compiler = cpp_builder.get_cpp_compiler()
    if _links_shared(compiler)[0]:
        return {}
    library = f":{RUNTIME}"  # by file name, before the libstdc++.a that the compiler adds
    linked, told = _links_shared(compiler, f"-l{library}")
    if linked:
        return {"aot_inductor.custom_op_libs": [library]}
    raise ExportFailedError(
        f"{compiler} links no library that uses {RUNTIME}, torch's C++ runtime, and programs with a copy of their "
        f"own crash as torch loads them{told}",
        "Set CXX to a compiler that does: `CXX=/usr/bin/g++` say.",
    )


def _links_shared(compiler: str, *options: str) -> tuple[bool, str]:
    """Return whether a linked library uses a shared runtime, and ": " and the last line of an error, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.returncode == 0:
            return is_shared(library.read_bytes()), ""
        return False, ": " + (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
