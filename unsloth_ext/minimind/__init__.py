"""MiniMind's architectures as stock transformers classes."""
