"""A toy method: a learned vector that is added to every input embedding."""
