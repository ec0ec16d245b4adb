"""Cost tables: layers timed or metered on a device, and time budgets landed with them."""
