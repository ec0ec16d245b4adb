"""Rounds weights to fewer bits: the grids that every format stores, and rounding that knows the data."""
