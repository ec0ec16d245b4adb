"""A layer as a chain of smaller operators: decompositions, forms, whitening, modules."""
