"""Recovers accuracy without labels: closed-form refits, refinement, batch-norm."""
