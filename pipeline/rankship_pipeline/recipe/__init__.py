"""The keys of a recipe, its merge methods, and the rules between them."""
