"""A small shape, text with something to learn, and a counter: what the tests of this room share."""

from __future__ import annotations

import random

from entasis.data import tokenizer
from entasis.evaluate.loading import Loaded
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

SHAPE = ModelShape(
    d_model=32, head_dim=16, vocabulary=257, layers=(LayerShape(2, 1, 64),) * 5, tied_embeddings=True, context=128
)  # fmt: skip
SEQUENCE = 64


def sentences(number: int, seed: int) -> list[str]:
    """Small documents with something to learn: spelling, and who does what."""
    draw = random.Random(seed)
    words = [["the cat", "a dog", "the old king", "my sister"], ["eats", "sees", "paints", "follows"],
             ["a fish", "the moon", "nobody", "the river"]]  # fmt: skip
    return [
        ". ".join(" ".join(draw.choice(w) for w in words) for _ in range(draw.randint(2, 6)))
        for _ in range(number)
    ]


def untrained(shape: ModelShape = SHAPE, seed: int = 0) -> Loaded:
    model = Transformer(shape)
    init_weights(model, seed)
    return Loaded(model.eval(), tokenizer.from_bytes())


class Count:
    """Counts evaluations of a model's blocks."""

    def __init__(self, model: Transformer) -> None:
        self.blocks = 0
        for block in model.blocks:
            block.register_forward_hook(self._one_more)

    def _one_more(self, *_: object) -> None:
        self.blocks += 1
