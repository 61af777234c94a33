"""The growth operators, each registered in a file of its own kind."""

from entasis.grow.operators import aligned, copies, fresh, means, predicted, widths

__all__ = ["aligned", "copies", "fresh", "means", "predicted", "widths"]
