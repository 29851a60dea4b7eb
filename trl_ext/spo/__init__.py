"""Single-stream Policy Optimization (arXiv 2509.13232): one completion per prompt, with a tracked value as baseline."""
