"""The way to a board: SSH."""
