"""Accuracy regained without labels: refit in closed form, refinement, batch-norm."""
