"""Rank allocators, sensitivities, prices: which layer gets which rank, to an exact budget."""
