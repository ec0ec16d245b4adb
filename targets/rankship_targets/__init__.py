"""Device stage: transports, the agent on the device, meters, sessions."""
