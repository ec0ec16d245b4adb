"""Who a device is, and which devices are known."""
