"""Floor 0: shapes, profiles, cost, solver, presets, drawing. Imports no torch."""

from entasis.shape.shapes import LayerShape, ModelShape

__all__ = ["LayerShape", "ModelShape"]
