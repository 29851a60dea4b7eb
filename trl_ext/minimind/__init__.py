"""MiniMind's training stages on TRL's trainers."""
