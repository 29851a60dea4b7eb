"""Question-answering tasks with exact answers: data, reward, evaluation, and the embedded default that needs no hub."""
