"""A small model that has learned something, so that its layers do something."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_models import SEQUENCE, sentences, untrained

from entasis.anatomy import runner
from entasis.anatomy.subject import Subject
from entasis.evaluate.loading import Loaded


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
def make_subject() -> Callable[..., Subject]:
    def make(loaded: Loaded, number: int = 40) -> Subject:
        return runner.prepare_subject(loaded, sentences(number, 7), tokens=6000, sequence=SEQUENCE)

    return make
