"""Allocates ranks to layers under an exact budget: allocators, sensitivities, prices."""
