"""How models to merge differ, and what is made alike with proof."""
