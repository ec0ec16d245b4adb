"""Numbers with their uncertainty, every reason to doubt them, and verdicts between runs."""
