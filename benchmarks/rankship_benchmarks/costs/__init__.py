"""Layers timed or metered on a device, and budgets landed by it."""
