"""Concept tokens: online compression of text into discrete concepts."""
