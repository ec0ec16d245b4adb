"""Measuring stage: suites, trials, statistics, verdicts, reports."""
