"""Tasks with exact answers: data, reward, evaluation, and built-in tasks that need no hub."""
