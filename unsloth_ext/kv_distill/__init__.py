"""KV distillation on the model side: comparison of keys, values and queries of models of different shapes."""
