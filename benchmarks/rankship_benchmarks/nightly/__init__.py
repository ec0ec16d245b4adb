"""Nights: measuring, judging against earlier nights, and the page over all of them."""
