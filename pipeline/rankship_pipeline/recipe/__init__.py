"""What a recipe says, and what it cannot mean."""
