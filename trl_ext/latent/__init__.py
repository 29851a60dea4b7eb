"""Latent chain of thought by self-distillation: what CODI, PCCoT and KaVa share."""
