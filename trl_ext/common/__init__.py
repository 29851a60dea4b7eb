"""Shared parts of the trainers: checkpoints, model loading, teachers, gradients, parameter groups."""
