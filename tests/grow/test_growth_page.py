"""docs/growth.md: its table is the registry's, and its stage lists are recipes."""

import math
import re
from pathlib import Path

import pytest

from entasis.configuration import load_yaml
from entasis.grow import operators  # noqa: F401  (registers them)
from entasis.grow.growth import OPERATORS
from entasis.grow.growth_timing import tokens_before_growth
from entasis.shape import specification
from entasis.shape.shapes import LayerShape, ModelShape
from entasis.train.recipe import from_dict
from entasis.train.resolve import resolve
from entasis.train.stages import lay_out

PAGE = (Path(__file__).parents[2] / "docs" / "growth.md").read_text()
LLAMA = ModelShape(d_model=64, head_dim=16, vocabulary=257, layers=(LayerShape(4, 2, 96),) * 32)
LAYERS = {"llama_pro": 40, "lesa": 48, "solar": 48, "stack": 24, "append_last": 12, "append_middle": 12, "append_random": 12, "average": 12}  # fmt: skip


def row(name: str) -> str:
    kind = OPERATORS[name]
    rule = " ".join((kind.__doc__ or "").split()).replace("|", "\\|")
    options = ", ".join(f"`{option}`" for option in kind.model_fields)
    return f"| `{name}` | {options} | {rule} | {'yes' if kind.keeps_function else ''} |"


def test_the_table_is_the_registry_s():
    missing = [line for name in sorted(OPERATORS) if (line := row(name)) not in PAGE]
    assert not missing, "docs/growth.md should hold:\n" + "\n".join(missing)
    assert len(re.findall(r"^\| `[a-z_]+` \| `", PAGE, re.MULTILINE)) == len(OPERATORS)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_stage_lists_are_recipes(block, tmp_path):
    source = load_yaml(block, "growth.md")
    folder = source.pop("start", None)
    shape = (
        LLAMA
        if folder
        else specification.resolve({"vocabulary": 257, "context": 128, **source["shape"]}).shape
    )
    if folder:  # laid out as if the first stage came after another
        source["stages"].insert(0, {"tokens": "1M"})
    data = {"train": "corpora/train", "sequence": 128}
    recipe = from_dict({**source, "shape": shape.to_dict(), "data": data, "batch": {"tokens": 1024}})
    spans = lay_out(resolve(recipe, shape.vocabulary)[0], shape)
    (operator,) = {s.transition["grow"]["operator"] for s in recipe.stages if s.transition}
    assert spans[-1].shape.n_layers == LAYERS[operator]
    assert any(span.lineage.newest for span in spans)


def test_the_timing_is_what_the_formula_gives():
    [(parameters, compute, told)] = re.findall(
        r"tokens_before_growth\((\S+), (.+)\)  # ([\d,]+) tokens", PAGE
    )
    flops = math.prod(float(factor) for factor in compute.split("*"))
    assert tokens_before_growth(float(parameters), flops) == int(told.replace(",", ""))
