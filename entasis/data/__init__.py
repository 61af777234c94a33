"""Floor 1: corpora as typed token shards. Yields NumPy; imports no torch."""
