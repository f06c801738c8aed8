"""Text to tokens and back: vocabulary, tokenizer, chat template. Imports bundle."""
