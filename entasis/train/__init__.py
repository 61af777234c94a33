"""Training: a recipe becomes a run folder. `entasis.train.run.train` is the whole of it."""
