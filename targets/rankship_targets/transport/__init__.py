"""The ways to a device, behind one Protocol."""
