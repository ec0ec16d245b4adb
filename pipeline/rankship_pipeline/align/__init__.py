"""Finds how models to merge differ, and makes them alike with a numerical check."""
