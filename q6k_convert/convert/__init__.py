"""Convert a GGUF file to a bundle: plan, repack, stream, stage the output."""

__all__ = ["locking", "pipeline", "placing", "plan", "staging"]
