"""Optimizers and learning-rate schedules by name, from their own packages."""
