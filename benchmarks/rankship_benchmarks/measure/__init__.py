"""Measuring one device: parity gates, interleaved rounds, energy, profiles."""
