"""Online concept compression: middle layers read only concepts, deep layers concepts and the latest tokens."""
