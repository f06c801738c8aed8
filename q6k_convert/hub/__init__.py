"""Find, download and check GGUF files of the Hugging Face Hub, through huggingface_hub."""

from q6k_convert.hub.fetch import Source, fetched_bundle, local_path, resolve
from q6k_convert.hub.names import parse

__all__ = ["Source", "fetched_bundle", "local_path", "parse", "resolve"]
