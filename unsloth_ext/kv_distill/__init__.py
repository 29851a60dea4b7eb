"""A teacher's keys, values and queries against a student's of another shape: layers, heads, time and width."""
