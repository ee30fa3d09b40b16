"""Packed models: group codes, the file format, and packing itself."""
