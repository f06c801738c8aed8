"""Models as programs: torch.export and AOTInductor, the package file, running it, and ExecuTorch's classes.
Imports everything below.
"""

__all__ = ["executorch", "exportable", "exporting", "program"]
