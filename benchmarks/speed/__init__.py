"""How long Rankship takes and how much memory, in one run with a peer or a limit; not in the wheel."""
