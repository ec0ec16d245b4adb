"""What one measurement asked for and what it brought home."""
