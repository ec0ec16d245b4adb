"""Statistics: estimates, intervals, steps."""
