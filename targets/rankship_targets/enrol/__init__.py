"""Adding a device to the inventory, and the doctor who finds what spoils its numbers."""
