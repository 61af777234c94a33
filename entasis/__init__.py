"""Entasis: design, train, dissect and serve language models whose layers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from entasis.evaluate.loading import Loaded

__version__ = "0.1.0"


def load(path: str | Path, **options: Any) -> Loaded:
    """A model with `.shape`, `.tokenizer`, `.logits`, `.hidden_states`, `.generate` and `.save`; see `entasis.evaluate.loading.load`."""
    from entasis.evaluate.loading import load as load_model  # torch only when it is needed

    return load_model(path, **options)
