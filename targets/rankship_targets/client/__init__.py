"""Calls of the agent on a device, and measurements that outlive the connection."""
