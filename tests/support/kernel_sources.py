"""A tiny kernel to compile, cache and load."""

from __future__ import annotations

from q6k_kernels.jit.compiler import Defines

COMMON = "typedef unsigned u32;\n"
KERNEL = 'extern "C" __global__ void k(u32* p) {\n  *p = VALUE;\n}\nextern "C" __global__ void other() {}\n'
ARCHITECTURES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100", 120: "sm_120"}
ONE: Defines = (("VALUE", 1),)
