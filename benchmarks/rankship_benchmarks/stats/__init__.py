"""Statistics: estimates, intervals, steps in a history, Pareto fronts."""
