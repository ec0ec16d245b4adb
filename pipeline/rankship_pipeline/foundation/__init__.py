"""What every room of every package may import: records, errors, units, files, the store, the console."""
