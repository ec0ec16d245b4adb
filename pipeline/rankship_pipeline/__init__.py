"""The host's stage: turns trained models into verified low-rank artifacts."""

__version__ = "0.1.0"
