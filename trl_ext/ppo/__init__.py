"""Proximal Policy Optimization (arXiv 1707.06347) with a critic that values each token."""
