"""The operations as one C++ library on torch's stable ABI, built by `CMakeLists.txt` and the modules here.

`q6k-convert build-ops` builds the library; `q6k_kernels.ops.library.load` loads it in place of the Python
implementations. `src/` has the host side, `../cuda/` the kernels, the same files that Python compiles at run time.
"""

__all__ = ["cubins", "generate", "units"]
