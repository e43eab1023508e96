"""Files of what was tuned alone: parts, heads, buffers; the frozen base stays where it is, known by its fingerprint."""
