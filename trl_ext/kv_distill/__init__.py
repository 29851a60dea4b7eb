"""Distillation from the keys, values and attention of a teacher of another shape."""
