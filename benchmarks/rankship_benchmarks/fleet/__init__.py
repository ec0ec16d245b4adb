"""Many devices at once: the schedule, threads, and Dask."""
