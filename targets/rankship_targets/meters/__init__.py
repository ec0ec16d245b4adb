"""Meters: every source of a power trace, behind one Protocol."""
