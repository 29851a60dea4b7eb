"""Single-stream Policy Optimization (arXiv 2509.13232): one completion a prompt, a value that is tracked."""
