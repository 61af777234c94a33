"""The structure measures against cases whose answer is known."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_models import untrained

from entasis.anatomy.diagnostics import manipulation, recovery
from entasis.anatomy.diagnostics.similarity import estimate_hsic
from entasis.anatomy.diagnostics.spectrum import describe_spectrum, estimate_exponent
from entasis.anatomy.measures import choose
from entasis.anatomy.runner import run_measures


def rows(subject, name: str, quantity: str) -> list[float]:
    frame = run_measures(subject, choose([name]))
    return frame[frame["quantity"] == quantity]["value"].tolist()


def test_spectra_of_known_matrices() -> None:
    identity, one = (
        describe_spectrum(torch.eye(16)),
        describe_spectrum(torch.outer(torch.ones(8), torch.arange(1.0, 5))),
    )
    assert identity["stable_rank"] == pytest.approx(16) and identity["effective_rank"] == pytest.approx(
        16, rel=1e-4
    )
    assert one["stable_rank"] == pytest.approx(1) and one["effective_rank"] == pytest.approx(1, rel=1e-3)
    assert describe_spectrum(torch.full((4, 9), -0.5))["weight_rms"] == pytest.approx(0.5)
    assert describe_spectrum(torch.zeros(3, 3))["stable_rank"] == 0


def test_the_exponent_of_a_matrix_of_lower_rank_is_not_that_of_its_rounding() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 8, dtype=torch.float64), torch.randn(8, 96, dtype=torch.float64)
    exact = torch.linalg.svdvals(left @ right).square()[:8]
    found = describe_spectrum((left @ right).float())["spectral_exponent"]
    assert found == pytest.approx(estimate_exponent(exact), rel=1e-4)


def test_hill_finds_the_exponent_of_a_power_law() -> None:
    uniform = torch.arange(1, 4001, dtype=torch.float64) / 4001
    assert estimate_exponent(uniform ** (-1 / 1.5)) == pytest.approx(2.5, rel=0.02)  # density λ^-(1 + 1.5)
    assert math.isnan(estimate_exponent(torch.ones(8, dtype=torch.float64)))


def test_hsic_is_unbiased_and_sees_a_rotation() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 8, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    both = estimate_hsic(torch.stack([x @ x.T, 4 * (x @ turn) @ (x @ turn).T]))
    assert both[0, 1] / (both[0, 0] * both[1, 1]).sqrt() == pytest.approx(1)
    drawn = [torch.randn(2, 20, 30, dtype=torch.float64) for _ in range(200)]
    independent = torch.stack([estimate_hsic(x @ x.transpose(1, 2))[0, 1] for x in drawn])
    assert abs(independent.mean()) < 3 * independent.std() / math.sqrt(200)


def test_attention_entropy(trained, make_subject) -> None:
    found = rows(make_subject(trained), "attention_entropy", "attention_entropy")
    assert all(0 < v < 1 for v in found)
    with torch.no_grad():
        trained.model.blocks[1].attention.query.weight.zero_()  # attends to all alike
        trained.model.blocks[2].attention.query.weight.mul_(1e4)  # attends to one
    found = rows(make_subject(trained), "attention_entropy", "attention_entropy")
    assert found[1] == pytest.approx(1, abs=1e-4) and found[2] < 0.05


def test_the_lens_ends_at_the_loss(trained, make_subject) -> None:
    subject = make_subject(trained)
    lens = rows(subject, "logit_lens", "logit_lens")
    assert lens[-1] == pytest.approx(rows(subject, "loss", "loss")[0], rel=1e-6) and lens[0] > lens[-1]


def test_fisher_is_the_squared_gradient(trained, make_subject) -> None:
    subject = make_subject(trained, 2)
    batch = next(subject.batches())
    assert len(subject.text.owner) <= 5 * 64
    expected, windows = torch.zeros(5), 0
    for batch in subject.batches():
        for tokens, targets in zip(batch.tokens_BT.split(1), batch.targets_BT.split(1), strict=True):
            trained.model.zero_grad()
            (trained.model.loss(tokens, targets) / (targets != -100).sum()).backward()
            expected += torch.tensor(
                [sum(float(p.grad.square().sum()) for p in b.parameters()) for b in trained.model.blocks]
            )
            windows += 1
    trained.model.embedding.requires_grad_(False)
    found = rows(subject, "gradient", "fisher")
    assert found == pytest.approx((expected / windows).tolist(), rel=1e-3)
    assert not trained.model.embedding.tokens.weight.requires_grad  # left as it was
    assert trained.model.blocks[0].attention.query.weight.requires_grad


def test_cka_of_a_layer_with_itself_is_one(trained, make_subject) -> None:
    frame = run_measures(make_subject(trained), choose(["similarity"]))
    square = frame.pivot_table(index="layer", columns="target", values="value").to_numpy()
    assert square.diagonal() == pytest.approx([1] * 5) and (square <= 1 + 1e-9).all()
    assert square == pytest.approx(square.T)
    assert square[0, 1] > square[0, 4]  # the near ones are more alike


def test_manipulations_do_what_they_are_called() -> None:
    w, g = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    assert torch.equal(manipulation.scale_down(w, g), w * 0.9)
    assert float((manipulation.noise(w, g) - w).norm() / w.norm()) == pytest.approx(0.1)
    assert all(len(row.unique()) <= 15 for row in manipulation.quantise(w, g))
    assert int(torch.linalg.matrix_rank(manipulation.low_rank(w, g))) == 3
    turned = manipulation.sign_transpose(w, g)
    assert torch.equal(turned.abs(), w.abs()) and not torch.equal(turned, w)


def test_recovery(trained, make_subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "STEPS", 40)
    monkeypatch.setattr(recovery, "SEEDS", 1)
    before = {n: p.clone() for n, p in trained.model.named_parameters()}
    subject = make_subject(trained)
    gaps, steps = rows(subject, "recovery", "recovery_gap"), rows(subject, "recovery", "recovery_steps")
    assert max(gaps) > 0.02 and all(
        (s == 0) == (g < recovery.SMALLEST_GAP) for s, g in zip(steps, gaps, strict=True)
    )
    assert 0 < max(steps) <= 40 and min(s for s in steps if s) < 40
    assert all(torch.equal(before[n], p) and p.requires_grad for n, p in trained.model.named_parameters())
    fresh = rows(make_subject(untrained()), "recovery", "recovery_gap")
    assert max(map(abs, fresh)) < 0.02  # nothing to lose


def test_recovery_finds_a_planted_slow_layer(trained, make_subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices ten times as large behind norms of a tenth compute the same, and take AdamW's steps longer to mend."""
    monkeypatch.setattr(recovery, "SEEDS", 1)
    steps = {}
    for name in ("as it was", "slow"):
        if name == "slow":
            block = trained.model.blocks[1]
            with torch.no_grad():
                for norm, matrices in (
                    (
                        block.attention_norm,
                        [block.attention.query, block.attention.key, block.attention.value],
                    ),
                    (block.feedforward_norm, [block.feedforward.gate, block.feedforward.up]),
                ):
                    norm.weight /= 10
                    for matrix in matrices:
                        matrix.weight *= 10
        subject = replace(make_subject(trained), only=frozenset({1, 2}))
        gaps = rows(subject, "recovery", "recovery_gap")
        steps[name] = rows(subject, "recovery", "recovery_steps")
        assert all(gap > recovery.SMALLEST_GAP for gap in gaps)
    assert steps["slow"][0] > 1.5 * steps["as it was"][0]
    assert steps["slow"][1] == steps["as it was"][1], "the other layer is as quick as before"
