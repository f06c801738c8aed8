"""Is a bundle right: structure, content, against its source, on the device; and the report."""

__all__ = ["device_stage", "report", "source_stage", "stages"]
