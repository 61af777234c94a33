"""Weights of a mixture by rule, from how many tokens each corpus has.

A new rule is one registered class: its fields are its options, `weights` gives a number for each corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from entasis.configuration import Settings, parse
from entasis.errors import UserError
from entasis.registry import Registry

_FINEST = 10_000
"""Shares are rounded to one part in so many, which bounds the period of the mixture."""


class MixtureRule(Settings):
    """One way to weigh corpora."""

    def weights(self, tokens: Sequence[int]) -> list[float]:
        """What each corpus of so many tokens weighs, relative to the others."""
        raise AssertionError("each rule has its own")


MIXTURE_RULES: Registry[type[MixtureRule]] = Registry("mixture rule")


@MIXTURE_RULES.register("proportional")
class Proportional(MixtureRule):
    """Each corpus by its tokens: all are read equally often."""

    def weights(self, tokens: Sequence[int]) -> list[float]:
        return [float(n) for n in tokens]


@MIXTURE_RULES.register("temperature")
class Temperature(MixtureRule):
    """Each corpus by its tokens to the power `alpha`, as languages are mixed in multilingual training: 0.3 in XLM-R
    (1911.02116) and mT5 (2010.11934). 1 is proportional, 0 gives all the same.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.3

    def weights(self, tokens: Sequence[int]) -> list[float]:
        return [float(n) ** self.alpha for n in tokens]


def read(source: str | Mapping[str, Any], where: str) -> MixtureRule:
    """The rule in `NAME` or `{NAME: {option: value}}`. Raises `UserError`."""
    plain = {source: {}} if isinstance(source, str) else dict(source)
    if len(plain) != 1:
        raise UserError(f"{where} is {plain!r}; name one of {', '.join(MIXTURE_RULES)}")
    name, options = next(iter(plain.items()))
    return parse(MIXTURE_RULES.find(name), options or {}, f"{where}.{name}")


def shares(rule: MixtureRule, tokens: Sequence[int]) -> list[float]:
    """The rule's weights as shares of all tokens read, in ten-thousandths, none of them zero."""
    found = rule.weights(tokens)
    total = sum(found)
    return [max(1, round(_FINEST * weight / total)) / _FINEST for weight in found]
