"""Transports: the ways to a device, behind one Protocol."""
