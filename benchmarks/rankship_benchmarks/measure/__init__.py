"""One device measured, from the parity gate to the raw samples."""
