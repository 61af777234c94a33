"""A small model that has learned something, so that its layers do something."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch

from entasis.anatomy import dissection
from entasis.anatomy.subject import Subject
from entasis.data import tokenizer
from entasis.evaluate.loading import Loaded
from entasis.model.initialisation import initialise
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
    initialise(model, seed)
    return Loaded(model.eval(), tokenizer.from_bytes())


@pytest.fixture(scope="session")
def _taught() -> Loaded:
    loaded = untrained()
    ids = [i for text in sentences(600, 1) for i in [*loaded.encode(text), 256]]
    stream = torch.tensor(ids)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=4e-3)
    torch.manual_seed(0)
    for _ in range(200):
        starts = torch.randint(len(stream) - SEQUENCE - 1, (12,))
        rows = torch.stack([stream[s : s + SEQUENCE + 1] for s in starts])
        loss = loaded.model.loss(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.2  # log 257 is 5.5
    return loaded


@pytest.fixture
def trained(_taught: Loaded) -> Loaded:
    """A copy for each test, as some plant things in it."""
    return Loaded(copy.deepcopy(_taught.model), _taught.tokenizer)


@pytest.fixture
def lay_out() -> Callable[..., Subject]:
    def make(loaded: Loaded, number: int = 40) -> Subject:
        return dissection.lay_out(loaded, sentences(number, 7), tokens=6000, sequence=SEQUENCE)

    return make


class Count:
    """Counts evaluations of a model's blocks."""

    def __init__(self, model: Transformer) -> None:
        self.blocks = 0
        for block in model.blocks:
            block.register_forward_hook(self._one_more)

    def _one_more(self, *_: object) -> None:
        self.blocks += 1
