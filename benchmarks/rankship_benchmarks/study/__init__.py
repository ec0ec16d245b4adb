"""Studies: compression methods compared at several budgets on several models, in one table and page."""
