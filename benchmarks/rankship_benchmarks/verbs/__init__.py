"""Commands that join the stages: run, bench, compare, costs, nightly, deploy."""
