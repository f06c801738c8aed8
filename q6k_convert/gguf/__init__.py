"""The GGUF reader: bounded bytes, one file, its tensors, a model of one or more files."""
