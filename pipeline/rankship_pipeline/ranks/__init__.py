"""Which layer gets which rank, to an exact budget in one price."""
