"""How a device joins the inventory, and what spoils its numbers."""
