"""Planner and executor: first a plan of discrete concepts, then a text from the plan alone."""
