"""A device that is held, measured and let go."""
