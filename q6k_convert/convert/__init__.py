"""From a GGUF file to a bundle: plan, repacking, streaming, staging of the output. Imports gguf and the kernel
package's formats and bundle.
"""

__all__ = ["pipeline", "plan", "staging"]
