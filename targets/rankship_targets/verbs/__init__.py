"""Commands about devices and kits."""
