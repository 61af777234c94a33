import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers each time it runs."""
    torch.manual_seed(0)
