"""The page and the terminal tables of one run."""
