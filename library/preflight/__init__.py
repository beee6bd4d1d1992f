"""What a run will do, told before it does it: facts without a model loaded, advice on them, and how both are shown."""
