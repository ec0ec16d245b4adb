"""Measuring stage of Rankship: trials, statistics and the report."""
