"""Many ways to many budgets on several models: one table, one page."""
