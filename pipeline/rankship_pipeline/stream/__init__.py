"""Compresses models one decoder block at a time, and merges them by tensor, for models larger than memory."""
