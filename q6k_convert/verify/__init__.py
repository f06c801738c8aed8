"""Is a bundle right: structure, content, against its source, on the device; and the report."""
