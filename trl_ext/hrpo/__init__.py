"""HRPO: GRPO whose rollouts think in latent space (arXiv 2505.18454), with a trainable thinking projection."""
