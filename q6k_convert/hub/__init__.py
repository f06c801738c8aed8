"""Find, download and check GGUF files of the Hugging Face Hub, through huggingface_hub."""

from q6k_convert.hub.fetch import Source, local_path, resolve
from q6k_convert.hub.names import parse

__all__ = ["Source", "local_path", "parse", "resolve"]
