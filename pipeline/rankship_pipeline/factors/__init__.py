"""A layer as a chain of smaller operators: decompositions, forms, and the modules that run them."""
