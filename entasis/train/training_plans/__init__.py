"""The training plans, each registered in a file of its own; see `plan`."""

from entasis.train.training_plans import autofreeze, freezeout, growth_transformer, importance_groups, lisa

__all__ = ["autofreeze", "freezeout", "growth_transformer", "importance_groups", "lisa"]
