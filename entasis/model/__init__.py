"""Floor 2: one decoder of per-layer shapes."""
