"""Suites, and bundles that hold every raw sample of a run."""
