"""HRPO on the model side: thinking modules, thinking states, hybrid decoding, and states recomputed for training."""
