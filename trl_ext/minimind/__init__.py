"""MiniMind's stages on TRL's trainers."""
