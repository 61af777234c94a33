"""Training: a recipe becomes a run folder. `entasis.train.loop.train` is the whole of it."""
