"""Runs the stages of a recipe in order; each result is stored by the hash of everything it depends on."""
