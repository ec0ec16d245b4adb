"""The records of one measurement: request, trial, power trace."""
