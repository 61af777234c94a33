"""The timing formula of G_stack, within its range and refused outside it."""

import pytest

from entasis.errors import UserError
from entasis.grow.growth_timing import tokens_before_growth


def test_the_formula():
    # By hand: 0.88 · 9.0414 + 163.27 / 21 − 5.74 = 9.9912
    assert tokens_before_growth(1.1e9, 1e21) == pytest.approx(9.80e9, rel=2e-3)
    # More compute lets a model grow earlier, a larger one later.
    assert tokens_before_growth(1.1e9, 1e22) < tokens_before_growth(1.1e9, 1e21)
    assert tokens_before_growth(3e9, 1e21) > tokens_before_growth(1.1e9, 1e21)


@pytest.mark.parametrize(("parameters", "compute", "says"), [(4e6, 1e21, "parameters"), (1e9, 1e14, "FLOPs")])
def test_outside_its_range_it_is_refused(parameters, compute, says):
    with pytest.raises(UserError, match=rf"fitted on .* {says}.* choose a share of the tokens"):
        tokens_before_growth(parameters, compute)
