"""Latent chain of thought: a model that thinks in a few latent tokens between question and answer."""
