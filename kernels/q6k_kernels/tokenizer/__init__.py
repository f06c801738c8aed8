"""Text to tokens and back: vocabulary, tokenizer, chat template. Imports `bundle`."""

__all__ = ["hugging_face", "text_tokenizer", "tokenizer", "vocabulary"]
