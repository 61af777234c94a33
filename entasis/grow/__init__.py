"""Floor 3: models made from models. Layers resized, dropped and repeated."""
