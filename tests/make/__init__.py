"""What tests are made of: records, files, models and pretended devices that more than one test file needs."""

from pathlib import Path

TESTS = Path(__file__).parents[1]  # what a script in a process of its own puts on its path to import `make`
