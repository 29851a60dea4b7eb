"""Compression of cached keys and values: scores, selection, and a cache that stays within a budget."""
