"""Many devices at once: schedule, threads, Dask."""
