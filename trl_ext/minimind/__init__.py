"""MiniMind's published data for TRL's trainers."""

from .data import load_minimind_data


__all__ = ["load_minimind_data"]
