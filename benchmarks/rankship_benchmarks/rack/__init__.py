"""Devices that are attached to several hosts: Dask carries errands there, and bundles home."""
