"""Calibration statistics, accuracy, perplexity, and the limits on what a model may lose."""
