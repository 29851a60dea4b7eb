"""KV distillation on the model side: a student's keys, values and queries compared with those of a teacher of another
shape.
"""
