"""Entasis: design, train, dissect and serve language models whose layers differ."""

__version__ = "0.1.0"
