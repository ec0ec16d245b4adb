"""Compressing and merging one decoder block at a time, for models larger than memory."""
