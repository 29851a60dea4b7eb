"""Distillation on SFTTrainer: from a teacher's logits, and from reasoning with tags (two stages of MiniMind)."""
