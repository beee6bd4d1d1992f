"""FLUX behind one root module: what the trainer calls, and nothing else."""
