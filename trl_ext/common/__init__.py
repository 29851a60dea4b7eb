"""What several trainers use: checkpoints, model loading, teachers, gradients, parameter groups."""
