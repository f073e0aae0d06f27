"""Buffers: what environments said, and the returns that follow from it."""
