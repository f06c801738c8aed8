"""Packed weights in memory: the weight, its layers, the bundle's reader, and the way to a device. Imports bundle
and ops.
"""

__all__ = ["byte_layers", "casting", "experts", "layers", "reader", "transfer", "weight"]
