"""Text to tokens and back: vocabulary, tokenizer, chat template. Imports `bundle`."""

__all__ = ["text_tokenizer", "tokenizer", "vocabulary"]
