"""MiniMind's architectures in stock classes."""
