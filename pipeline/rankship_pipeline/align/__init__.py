"""How models to merge differ, and making them alike with proof."""
