"""The growth operators, each registered in a file of its own kind."""

from entasis.grow.operators import copies, fresh, means, widths

__all__ = ["copies", "fresh", "means", "widths"]
