"""Verbs that join the stages."""
