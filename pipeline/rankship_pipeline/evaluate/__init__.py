"""What a model answers: calibration statistics, accuracy, perplexity, and the limits on what may be lost."""
