"""Ranks behind a Protocol: one process, DDP, DeepSpeed."""
