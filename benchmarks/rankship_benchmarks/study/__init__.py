"""Many ways to many budgets on several models."""
