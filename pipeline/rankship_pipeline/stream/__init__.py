"""The same, one decoder block at a time, for models larger than memory."""
