"""Verbs that speak to devices."""
