"""The q6k-planar bundle on disk: shards, manifest, writer, structure and content checks, metadata.

Imports formats and gguf; no torch, no GPU.
"""

__all__ = [
    "companions",
    "content",
    "links",
    "manifest",
    "metadata",
    "naming",
    "parsing",
    "published",
    "shards",
    "stated_sampling",
    "storage",
    "structure",
    "writer",
]
