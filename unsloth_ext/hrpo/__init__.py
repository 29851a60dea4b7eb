"""HRPO's model side: thinking modules, states, decoding, and states that are recomputed for training."""
