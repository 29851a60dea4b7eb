"""Latent chain of thought by self-distillation: CODI, PCCoT and KaVa."""
