"""Planner-executor: a causal LM writes typed discrete concepts, then text from these alone."""
