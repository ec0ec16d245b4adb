"""What is recovered after compression, without labels."""
