"""One device measured: parity gates, interleaved rounds, energy, profiles."""
