"""Online concept compression: middle layers read discrete concepts only, deep layers concepts and the tail of tokens."""
