"""The q6k-planar bundle: its bit layout, its file format, and what runs it.

Importing this package imports no torch; the functions that need it do.
"""
