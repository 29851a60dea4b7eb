"""Which keys and values of a trace are worth keeping: scores, selection, and what reads or shortens a cache with them."""
