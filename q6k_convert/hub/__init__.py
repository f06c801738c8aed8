"""Files of the Hugging Face Hub by name: what a name means, downloading by huggingface_hub, the check of what came.
Imports nothing of the other rooms.
"""

from q6k_convert.hub.fetch import Source, local_path, resolve
from q6k_convert.hub.names import parse

__all__ = ["Source", "local_path", "parse", "resolve"]
