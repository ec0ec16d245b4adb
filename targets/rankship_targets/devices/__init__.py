"""Devices and the inventory that names them; quarantine."""
