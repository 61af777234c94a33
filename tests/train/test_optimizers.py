import pytest
import torch
from torch import nn

from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape
from entasis.train import moments, optimizers
from entasis.train.muon import Muon, orthogonalise
from entasis.train.recipe import Optimizer

SHAPE = {
    "d_model": 32,
    "head_dim": 8,
    "vocabulary": 64,
    "context": 32,
    "layers": (LayerShape(2, 1, 48), LayerShape(4, 2, 0), LayerShape(0, 0, 96)),
}


def model(**changes) -> Transformer:
    return Transformer(
        ModelShape(**{**SHAPE, "norm": "layernorm", "norm_bias": True, "ffn_bias": True, **changes})
    )


def names_where(built, module, condition) -> set[str]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]
        for rule in built
        for group in rule.param_groups
        for p in group["params"]
        if condition(rule, group)
    }


def every(module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


ATTENTION = [f"attention.{role}.weight" for role in ("query", "key", "value", "output")]
FFN = [f"feedforward.{role}.weight" for role in ("gate", "up", "down")]
HIDDEN = {
    *(f"blocks.0.{name}" for name in ATTENTION + FFN),
    *(f"blocks.1.{name}" for name in ATTENTION),
    *(f"blocks.2.{name}" for name in FFN),
}


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_spares_vectors_and_embeddings(tied):
    module = model(tied_embeddings=tied)
    built = optimizers.build(module, Optimizer(weight_decay=0.1), every(module))
    decayed = names_where(built, module, lambda _, group: group["weight_decay"] > 0)
    assert decayed == (HIDDEN if tied else HIDDEN | {"head.weight"})


def test_muon_gets_hidden_matrices_and_adamw_the_rest():
    module = model()
    built = optimizers.build(module, Optimizer(name="muon"), every(module))
    muon = names_where(built, module, lambda rule, _: isinstance(rule, torch.optim.Muon))
    assert muon == HIDDEN
    rest = names_where(built, module, lambda rule, _: isinstance(rule, torch.optim.AdamW))
    assert rest == set(every(module)) - muon


def trained_by(rule_of, steps: int = 4) -> list[torch.Tensor]:
    """Matrices wide, tall and square after some steps of the rule on fixed gradients, clear of rounding's size."""
    drawn = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=drawn)) for s in ((24, 64), (64, 24), (32, 32))]
    rule = rule_of(weights)
    for _ in range(steps):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=drawn)
        rule.step()
    return [p.detach() for p in weights]


def library(weights):
    return torch.optim.Muon(
        [{"params": weights, "weight_decay": 0.1}], lr=0.02, adjust_lr_fn="match_rms_adamw"
    )


def test_muon_is_the_library_s_to_the_bit_in_bf16():
    ours = trained_by(lambda w: Muon([{"params": w, "weight_decay": 0.1}], lr=0.02, dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(ours, trained_by(library), strict=True))


def test_muon_in_fp32_differs_from_it_by_bf16_s_rounding():
    before = trained_by(library, steps=0)
    ours = trained_by(lambda w: Muon([{"params": w, "weight_decay": 0.1}], lr=0.02, dtype=torch.float32))
    for start, a, b in zip(before, ours, trained_by(library), strict=True):
        moved = (b - start).norm()
        assert 0 < (a - b).norm() < 0.02 * moved


def test_orthogonalising_brings_singular_values_near_one_and_leaves_the_directions():
    drawn = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(drawn, full_matrices=False)
    found = u.T @ orthogonalise(drawn) @ vh.T
    assert torch.allclose(found, found.diagonal().diag(), atol=1e-9)
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.25
    assert torch.allclose(orthogonalise(drawn.T), orthogonalise(drawn).T)


def test_only_what_learns_is_in_a_group():
    module = model()
    learning = [name for name in every(module) if name.startswith("blocks.2.")]
    built = optimizers.build(module, Optimizer(), learning)
    assert names_where(built, module, lambda *_: True) == set(learning)


def test_mup_divides_learning_rates_of_hidden_matrices_by_their_own_fan_in():
    module = model()
    built = optimizers.build(module, Optimizer(lr=1e-2, parametrisation="mup", base_width=16), every(module))
    rate = {}
    names = {id(p): name for name, p in module.named_parameters()}
    for rule in built:
        for group in rule.param_groups:
            rate |= {names[id(p)]: group["initial_lr"] for p in group["params"]}
    assert rate["embedding.tokens.weight"] == pytest.approx(1e-2)
    assert rate["blocks.0.attention.query.weight"] == pytest.approx(1e-2 / 2)
    up, down = (module.get_parameter(f"blocks.2.feedforward.{part}.weight") for part in ("up", "down"))
    ratio = rate["blocks.2.feedforward.up.weight"] / rate["blocks.2.feedforward.down.weight"]
    narrow = rate["blocks.0.feedforward.down.weight"] / rate["blocks.2.feedforward.down.weight"]
    assert down.shape[1] == up.shape[0] == 96
    assert narrow == pytest.approx(96 / 48)
    assert ratio > 0


def test_fused_adamw_moves_every_parameter():
    module = model()
    init_weights(module, 0)
    before = {name: p.clone() for name, p in module.named_parameters()}
    built = optimizers.build(module, Optimizer(), every(module))
    tokens = torch.randint(64, (2, 16))
    module.loss(tokens, tokens).backward()
    for rule in built:
        rule.step()
    still = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_under_mup_muons_updates_have_the_spectral_norm_that_mup_asks_for():
    """√(fan_out / fan_in) times what it is at the base's width; Muon's own is √max(fan_out, fan_in)."""

    def norms(width: int) -> dict[str, float]:
        layers = (
            LayerShape(width // 16, width // 16, width // 2),
            LayerShape(3 * width // 16, width // 16, 4 * width),
        )
        module = model(d_model=width, layers=layers)
        scheme = Optimizer(name="muon", lr=1.0, parametrisation="mup", base_width=32)
        built = optimizers.build(module, scheme, every(module))
        name_of = {id(p): name for name, p in module.named_parameters()}
        return {
            name_of[id(p)]: group["initial_lr"] * max(p.shape) ** 0.5 / (p.shape[0] / p.shape[1]) ** 0.5
            for rule in built
            if isinstance(rule, Muon)
            for group in rule.param_groups
            for p in group["params"]
        }

    base, wide = norms(32), norms(256)
    assert wide == pytest.approx(base)
    assert len(base) == 14


def test_moments_that_are_carried_over_lie_beside_their_parameters():
    """The step too: fused AdamW on a GPU refuses one on the CPU."""
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    one = {"step": torch.tensor(4.0), "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
    moments.put(model, [optimizer], {"weight": one})
    assert {x.device.type for x in optimizer.state[model.weight].values()} == {"meta"}
