"""Factors a layer into a chain of smaller operators: decompositions, forms, whitening, modules."""
