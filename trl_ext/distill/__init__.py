"""Distillation on SFTTrainer: from a teacher's logits, and from traces with tagged reasoning (MiniMind's two stages)."""
