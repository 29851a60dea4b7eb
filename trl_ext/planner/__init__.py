"""Planner and executor: a plan of discrete concepts first, then text from it alone."""
