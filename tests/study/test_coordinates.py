"""Coordinate checks of muP as a study trains it: how far eight steps move a model, from the study's own plan."""

from typing import Any

import pytest
import torch

from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.study import plan, study_files
from entasis.study.arms import Findings
from entasis.train import optimizers, recipe
from entasis.train.resolve import resolve

STEPS, BATCH, SEQUENCE, VOCABULARY = 8, 4, 32, 128
WIDTHS = {f"d{d}": {"shape.d_model": d} for d in (64, 128, 256)}
HEADS_AND_FFN = {
    "equal": [(4, 176)] * 3,
    "slope": [(2, 44), (4, 176), (6, 308)],
    "cliff": [(1, 16), (1, 16), (10, 496)],
}
LAYERS = {
    arm: {"shape.layers": [{"n_heads": h, "n_kv_heads": h, "d_ff": d} for h, d in layers], "shape.profile": None,
          "shape.ffn_multiple": None}
    for arm, layers in HEADS_AND_FFN.items()
}  # fmt: skip


def planned(arms: dict[str, Any], learning_rate: str = "mup", **optimizer: Any) -> dict[str, dict[str, Any]]:
    """The recipes of a study's first seed, by arm; the first arm is the baseline."""
    source = {
        "base": {
            "shape": {"profile": "isotropic", "layers": 3, "d_model": 64, "head_dim": 16, "vocabulary": VOCABULARY,
                      "ffn_multiple": 1, "context": SEQUENCE},
            "data": {"train": "corpora/none", "sequence": SEQUENCE},
            "tokens": STEPS * BATCH * SEQUENCE,
            "batch": {"tokens": BATCH * SEQUENCE},
            "optimizer": {"lr": 4e-3, **optimizer},
        },
        "arms": arms,
        "protocols": ["flops"],
        "learning_rate": learning_rate,
        "seeds": 1,
    }  # fmt: skip
    study = study_files.from_dict(source, name="widths")
    grid = plan.lay_out(study, plan.solve(study), Findings()).grid["flops"]
    return {arm: runs[0].recipe for arm, runs in grid.items()}


def moved(source: dict[str, Any]) -> dict[str, float]:
    """Root mean square change of the logits, and of each block's attention and FFN output, over the steps."""
    resolved, shape, _ = resolve(recipe.from_dict(source), VOCABULARY)
    scheme = resolved.optimizer
    model = Transformer(shape)
    init_weights(model, resolved.seed, parametrisation=scheme.parametrisation, base_width=scheme.base_width)
    built = optimizers.build(model, scheme, [name for name, _ in model.named_parameters()])
    tokens_BT = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))

    def outputs() -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
            for name, module in model.named_modules()
            if name.endswith((".attention", ".feedforward"))
        ]
        with torch.no_grad():
            seen["logits"] = model(tokens_BT[:, :-1])
        for hook in hooks:
            hook.remove()
        return seen

    before = outputs()
    for _ in range(STEPS):
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        for optimizer in built:
            optimizer.step()
            optimizer.zero_grad()
    after = outputs()
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


def spread(arms: dict[str, Any], learning_rate: str = "mup", **optimizer: Any) -> dict[str, float]:
    """Of what moves: the most that it moves in any arm over the least."""
    found = [moved(source) for source in planned(arms, learning_rate, **optimizer).values()]
    return {name: max(f[name] for f in found) / min(f[name] for f in found) for name in found[0]}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("arms", [WIDTHS, LAYERS], ids=["widths", "layers"])
def test_under_mup_a_study_moves_arms_of_any_width_and_layers_alike(arms, optimizer):
    assert max(spread(arms, name=optimizer).values()) < 1.5


def test_the_check_sees_what_standard_parametrisation_does():
    assert spread(WIDTHS, "shared")["logits"] > 3
    assert max(spread(LAYERS, "shared").values()) > 2
