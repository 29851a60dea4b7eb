"""Latent tokens on the model side: a model that thinks in a few latent tokens between question and answer."""
