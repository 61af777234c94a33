import itertools

import pytest

from entasis import quantities
from entasis.errors import UserError
from entasis.train import recipe as recipes
from entasis.train import schedule
from entasis.train.resolve import resolve
from entasis.train.resolved_recipe import difference

SHAPE = "shape: {profile: crown, layers: 4, d_model: 32, head_dim: 16, budget: 60k, vocabulary: 256}"
TEXT = f"""
{SHAPE}
data: {{train: corpora/a, validation: corpora/b, sequence: 64}}
batch: {{tokens: 1_024}}
optimizer: {{lr: 6e-4}}
tokens: 0.5M
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_reads_types_and_overrides(path):
    recipe = recipes.read(path, ["optimizer.lr=1e-3", "--batch.micro=2", "data.sequence=32", "compile=false"])
    assert recipe.optimizer.lr == 1e-3
    assert (recipe.batch.tokens, recipe.batch.micro) == (1024, 2)
    assert recipe.data.sequence == 32
    assert recipe.compile is False


def test_overrides_reach_the_shape_and_numbered_stages(path):
    path.write_text(TEXT.replace("tokens: 0.5M", "stages: [{tokens: 1M}, {tokens: 2M}]"))
    recipe = recipes.read(path, ["shape.budget=80k", "stages.1.tokens=3M"])
    assert recipe.shape["budget"] == "80k"
    assert [stage.tokens for stage in recipe.stages] == [1_000_000, 3_000_000]


def test_on_is_a_word_and_no_truth(path):
    """YAML 1.1 would read the keys of `lora` and `anneal` as true."""
    path.write_text(f"{TEXT}stages: [{{tokens: 10k}}, {{tokens: 10k, lora: {{rank: 4, on: [attention]}}}}]")
    recipe = recipes.read(path, ["stages.0.anneal=[{on: 'blocks[0]', part: [0, 0.5]}]"])
    assert recipe.stages[1].lora.on == ["attention"] and recipe.stages[0].anneal[0].on == "blocks[0]"
    with pytest.raises(UserError, match="compile is 'off'; it must be true or false or auto"):
        recipes.read(path, ["compile=off"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate"),
        ("optimizer.betass=[0,1]", "did you mean optimizer.betas?"),
        ("optimizer.lr=high", "optimizer.lr is 'high'; it must be a number"),
        ("optimizer.name=sgd", "optimizer.name is 'sgd'; it must be adamw or muon"),
        ("compile=maybe", "compile is 'maybe'; it must be true or false or auto"),
        ("batch.micro=1.5", "batch.micro is 1.5; it must be a whole number of at least 1 or auto"),
        ("stages=[{traniable: all}]", "unknown key stages[0].traniable; did you mean stages[0].trainable?"),
        ("stages=[{train: all}]", "unknown key stages[0].train; it is called stages[0].trainable now"),
        ("optimizer.clip=1", "unknown key optimizer.clip; it is called optimizer.max_grad_norm now"),
        ("schedule.floor=0", "it is called schedule.min_lr_factor now"),
        ("optimizer.lr=.nan", "optimizer.lr is nan; it must be a number"),
        ("optimizer.lr=-1", "optimizer.lr is -1; it must be a number of at least 0"),
        ("optimizer.betas=[2,3]", "optimizer.betas[0] is 2; it must be a number"),
        ("optimizer.max_grad_norm=-1", "must be a number above 0 or null"),
        ("optimizer.max_grad_norm=0", "must be a number above 0 or null"),
        ("optimizer.eps=-1", "must be a number above 0"),
        ("optimizer.weight_decay=.nan", "weight_decay is nan"),
        ("checkpoint.keep_every=-3", "checkpoint.keep_every is -3; it must be a whole number"),
        ("batch.micro=0", "batch.micro is 0"),
        ("tokens=1e400", "tokens is inf"),
        ("tokens='1e400'", "tokens is '1e400'"),
        ("data={train: a, train: b}", "the key 'train' stands twice"),
        ("data=&a [*a]", "an alias refers to itself"),
        (
            "optimizer.base_head_dim=0",
            "optimizer.base_head_dim is 0; it must be a whole number of at least 1",
        ),
        ("seed=true", "seed is True; it must be a whole number"),
        ("stages=[{tokens: 1M, schedule: {warmpu: 3}}]", "did you mean stages[0].schedule.warmup?"),
        ("stages.3.tokens=1M", "override stages.3"),
        ("tokens", "write key=value"),
        ("tokens=]", "not valid YAML"),
        ("tokens=many", "tokens is 'many'; write a number such as"),
        ("schedule.warmup=half", "schedule.warmup is 'half'; write a number of steps (100) or a share"),
        ("stages=[{grow: {operator: stack}}]", "unknown key stages[0].grow"),
        ("stages=[{lroa: {rank: 8}}]", "unknown key stages[0].lroa; did you mean stages[0].lora?"),
        ("stages=[{tokens: 101%}]", "stages[0].tokens is '101%'; write a share such as 0.05 or 5%"),
        ("seed=zero", "seed is 'zero'; it must be a whole number"),
        ("data=3", "data is 3; it must be a mapping"),
    ],
)
def test_mistakes_are_named_in_one_line(path, override, says):
    with pytest.raises(UserError) as caught:
        recipes.read(path, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tokens=null", "tokens is missing"),
        ("batch.tokens=1000", "not a multiple of data.sequence 64; the nearest is 1024"),
        ("schedule.warmup=90%", "exceed the 488 steps"),
        ("stages=[{trainable: newest}]", "no layer was added before this stage"),
        ("stages=[{tokens: 1M}, {tokens: 1M}]", "the stages add up to 2000000"),
        ("optimizer.parametrisation=mup", "give optimizer.base_width"),
        ("data.sequence=4096", "batch.tokens is 1024, not a multiple of data.sequence 4096"),
    ],
)
def test_what_cannot_be_resolved_is_refused(path, override, says):
    with pytest.raises(UserError) as caught:
        resolve(recipes.read(path, [override]), 256)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("plan", [None, {"freezeout": {"spend": "flops"}}])
def test_warmup_and_decay_may_be_all_of_an_odd_number_of_steps(path, plan):
    """Their halves are rounded up."""
    halves = recipes.read(path, ["tokens=502_784", "schedule.warmup=50%", "schedule.decay=50%"])
    halves = halves.replaced(training_plan=plan)
    resolved, _, _ = resolve(halves, 256)
    assert resolved.tokens == 491 * 1024 or plan
    rates = [schedule.factor(resolved.schedule, step, 491) for step in range(491)]
    assert rates.index(max(rates)) == 245 and max(rates) == 1
    assert all(0.003 < abs(b - a) < 0.005 for a, b in itertools.pairwise(rates))
    with pytest.raises(UserError, match="exceed the"):
        resolve(halves.replaced(schedule=halves.schedule.replaced(decay="50.1%")), 256)


def test_resolved_recipe_is_explicit_and_reads_back_equal(path, tmp_path):
    resolved, shape, _ = resolve(recipes.read(path), 256)
    assert len(resolved.shape["layers"]) == 4
    assert len(resolved.stages) == 1
    assert resolved.stages[0].tokens == resolved.tokens == 500_000
    assert resolved.checkpoint.every == 49
    written = tmp_path / "resolved.yaml"
    written.write_text(recipes.to_yaml(resolved))
    again = recipes.read(written)
    assert difference(again, resolved) is None
    assert resolve(again, 256)[:2] == (resolved, shape)


def test_resolving_leaves_the_given_recipe_alone(path):
    recipe = recipes.read(path)
    resolve(recipe, 256)
    assert recipe == recipes.read(path)


def test_a_shape_without_vocabulary_takes_the_corpus_s(path):
    path.write_text(TEXT.replace(", vocabulary: 256", ""))
    assert resolve(recipes.read(path), 300)[1].vocabulary == 300


def test_difference_names_the_first_key_that_differs(path):
    a = recipes.read(path)
    b = recipes.read(path, ["optimizer.lr=1e-3"])
    assert difference(a, a) is None
    assert difference(a, b) == "optimizer.lr is 0.0006 there and 0.001 here"


@pytest.mark.parametrize(
    ("text", "value"), [("5B", 5_000_000_000), ("393_216", 393_216), (7, 7), ("1.5M", 1_500_000)]
)
def test_count(text, value):
    assert quantities.count(text, "tokens") == value
