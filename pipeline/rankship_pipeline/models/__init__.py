"""Trained models and data in: files, headers, modules, layers."""
