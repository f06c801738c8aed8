"""Convert a GGUF file to a bundle: plan, repack, stream, stage the output."""

__all__ = ["pipeline", "plan", "staging"]
