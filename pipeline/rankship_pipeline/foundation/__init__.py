"""Open to every room of every package: records, errors, units, files, store, console."""
