"""What a recipe may say: its keys, its merge methods, and the rules between them."""
