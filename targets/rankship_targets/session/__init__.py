"""A device that is held, measured and released; which files may be pushed."""
