"""What the host asks of the agent on a device."""
