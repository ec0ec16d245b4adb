"""Nights: measuring, judging against earlier nights, and a page over all of them."""
