"""Host stage: trained models in, verified low-rank artifacts out."""

__version__ = "0.1.0"
