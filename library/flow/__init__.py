"""The flow-matching objective: timesteps, path, loss, draws."""
