"""The run: composition, loop, checkpoints, events."""
