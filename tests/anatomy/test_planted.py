"""What is planted is found, and nothing is found where nothing is."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_models import SHAPE, untrained

from entasis.anatomy.measures import choose
from entasis.anatomy.runner import run_measures
from entasis.anatomy.summary import select_ablations, state_finding
from entasis.shape.shapes import LayerShape


def measured(subject, *names: str) -> pd.DataFrame:
    return run_measures(subject, choose(names))


def values(frame: pd.DataFrame, quantity: str) -> np.ndarray:
    return frame[frame["quantity"] == quantity].groupby("layer")["value"].mean().to_numpy()


@torch.no_grad()
def kill(block: torch.nn.Module) -> None:
    """The layer writes nothing."""
    block.attention.output.weight.zero_()
    block.feedforward.down.weight.zero_()


def test_a_dead_layer_changes_nothing(trained, make_subject) -> None:
    kill(trained.model.blocks[2])
    frame = measured(
        make_subject(trained), "skip", "zero_ffn", "mean_output", "stream", "spectrum", "gradient"
    )
    assert values(frame, "skip")[2] == 0 and values(frame, "zero_ffn")[2] == 0
    assert values(frame, "update_ratio")[2] == 0
    assert values(frame, "block_influence")[2] == pytest.approx(0, abs=1e-12)
    others = np.delete(values(frame, "skip"), 2)
    assert (others > 0.01).any()
    down = frame[(frame["quantity"] == "stable_rank") & (frame["layer"] == 2) & (frame["target"] == "down")]
    assert down["value"].item() == 0


def test_a_noisy_layer_is_harmful_and_the_trained_ones_are_not(trained, make_subject) -> None:
    found = select_ablations(measured(make_subject(trained), "skip"))["skip"]
    assert not found["harmful"].any()
    with torch.no_grad():
        for name in ("attention.output.weight", "feedforward.down.weight"):
            w = trained.model.blocks[3].get_parameter(name)
            w.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    frame = measured(make_subject(trained), "skip")
    found = select_ablations(frame)["skip"]
    assert found["harmful"].tolist() == [False, False, False, True, False]
    assert "Harmful, beyond chance and after Holm: 3" in state_finding(frame, 40)


def test_a_layer_that_changes_nothing_is_not_said_to_be_missed(trained, make_subject) -> None:
    """As a layer that `llama_pro` has just added."""
    found = measured(make_subject(trained), "skip")
    assert "the loss rose for each of them" in state_finding(found, 40)
    kill(trained.model.blocks[2])
    found = measured(make_subject(trained), "skip")
    assert "the loss did not fall for any of them" in state_finding(found, 40)


def test_a_duplicate_is_found(trained, make_subject) -> None:
    trained.model.blocks[2].load_state_dict(trained.model.blocks[1].state_dict())
    frame = measured(make_subject(trained), "predictability", "swap", "replacement", "delta_correlation")
    r2 = values(frame, "weight_r2")
    assert min(r2[1], r2[2]) > 0.999 and max(r2[0], r2[3], r2[4]) < 0.5
    assert values(frame, "swap")[1] == 0
    replaced = frame[frame["quantity"] == "replaced"].set_index("target")["value"]
    assert abs(replaced["1"]) < 1e-3 < replaced["4"]
    # W2 − W1 is zero, so what is left of both deltas beside it has no common part.
    alone = frame[(frame["quantity"] == "delta_deviation") & (frame["layer"] == 3)]
    assert len(alone) == 7


def test_the_null_of_independent_layers(make_subject) -> None:
    subject = make_subject(untrained(seed=5))
    frame = measured(subject, "predictability", "delta_correlation")
    assert abs(values(frame, "weight_r2")).max() < 0.03
    assert abs(values(frame, "weight_r2") - values(frame, "weight_r2_untrained")).max() < 0.05
    assert (values(frame, "weight_r2_mean") < 0).all()
    delta = frame[frame["quantity"] == "delta_deviation"]
    inside = (delta["low"] <= 0) & (delta["high"] >= 0)
    assert inside.mean() >= 0.75 and delta["value"].abs().mean() < 0.03  # 21 intervals of 95 %


def test_delta_deviation_sees_what_depth_shares(trained, make_subject) -> None:
    """Weights on a straight line over depth: equal deltas correlate at +1 instead of −0.5."""
    with torch.no_grad():
        base = torch.randn(64, 32)
        for i, block in enumerate(trained.model.blocks):
            block.feedforward.up.weight.copy_(base * i)
    frame = measured(make_subject(trained), "delta_correlation")
    up = frame[frame["target"] == "up"]
    assert (up["low"] > 1.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_model_has_no_harmful_layer(make_subject, seed: int) -> None:
    frame = measured(make_subject(untrained(seed=seed)), "skip", "zero_ffn", "neighbour_average")
    for rows in select_ablations(frame).values():
        assert not rows["harmful"].any()


def test_identical_layers_can_change_places(make_subject) -> None:
    loaded = untrained()
    for block in loaded.model.blocks[1:]:
        block.load_state_dict(loaded.model.blocks[0].state_dict())
    frame = measured(make_subject(loaded), "swap", "neighbour_average")
    assert abs(values(frame, "swap")).max() == 0
    assert abs(values(frame, "neighbour_average")).max() < 1e-5
    assert frame[frame["quantity"] == "swap"]["layer"].max() == SHAPE.n_layers - 2  # the last has none above


def test_layers_without_a_half(make_subject) -> None:
    layers = (LayerShape(2, 1, 0), LayerShape(0, 0, 64), LayerShape(2, 1, 32), LayerShape(2, 1, 64))
    frame = measured(
        make_subject(untrained(replace(SHAPE, layers=layers))), "ablation", "structure", "predictability"
    )
    present = frame.groupby("quantity")["layer"].apply(lambda s: s.dropna().unique().tolist())
    assert present["zero_attention"] == [0, 2, 3] and present["zero_ffn"] == [1, 2, 3]
    assert present["skip"] == [0, 1, 2, 3] and present["attention_entropy"] == [0, 2, 3]
    assert "weight_r2" not in present  # no two neighbours of one shape


def test_the_control_of_neighbours_is_never_drawn_from_them(trained, make_subject):
    """Layers 0 and 1 are one layer: only a neighbour can say anything of either."""
    trained.model.blocks[1].load_state_dict(trained.model.blocks[0].state_dict())
    for seed in range(5):
        frame = run_measures(replace(make_subject(trained), seed=seed), choose(["predictability"]))
        control = frame[frame["quantity"] == "weight_r2_permuted"]
        assert control["value"].max() < 0.9
        # The layers between have fewer others left than neighbours, so they have no control.
        assert sorted(set(control["layer"])) == [0, 4]
