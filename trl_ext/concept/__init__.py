"""Discrete concept tokens: online compression."""
