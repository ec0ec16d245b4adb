"""Many devices at once: the schedule, and a thread for each device."""
