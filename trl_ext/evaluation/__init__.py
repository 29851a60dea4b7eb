"""Evaluation of every kind of model with lm-evaluation-harness, and reports."""
