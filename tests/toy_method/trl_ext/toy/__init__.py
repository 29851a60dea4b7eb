"""A toy method: SFT of a model with a learned shift of its input embeddings."""
