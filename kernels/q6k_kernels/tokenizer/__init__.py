"""Text to tokens and back: vocabulary, tokenizer, chat template. Imports `bundle`."""

__all__ = ["tokenizer", "vocabulary"]
