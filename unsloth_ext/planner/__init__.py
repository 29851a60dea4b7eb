"""Planner and executor on the model side: a causal LM writes typed discrete concepts, then text from these alone."""
