"""The operations `torch.ops.q6k.*`: schemas, the reference on the CPU, the accuracy they promise, the C++ library
that can stand in for them, and a self-test. Imports formats, jit and cuda.
"""

__all__ = ["accuracy", "exact_weights", "grouped", "library", "products", "reference", "schema", "self_test"]
