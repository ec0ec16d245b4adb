"""Reads trained models and data: checkpoints, adapters, Hugging Face, modules, layers, loaders."""
