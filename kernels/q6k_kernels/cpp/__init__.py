"""The operations as one C++ library on torch's stable ABI: what builds it, `CMakeLists.txt` and the modules here.

`q6k-convert build-ops` is the command; `q6k_kernels.ops.library.load` puts the library in the place of Python's
implementations. `src/` has the host side, `../cuda/` the kernels, the same text that Python compiles at run time.
"""

__all__ = ["cubins", "generate", "units"]
