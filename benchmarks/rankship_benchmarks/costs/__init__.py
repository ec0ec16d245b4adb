"""Cost tables: layers timed or metered on a device, and budgets landed by them."""
