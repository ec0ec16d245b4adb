"""What to measure, and what was measured."""
