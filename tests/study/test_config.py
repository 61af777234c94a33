"""Study files: what is read, and what one clear line says when something is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from entasis.errors import UserError
from entasis.study import config, study_files


def source(**changes: Any) -> dict[str, Any]:
    return {
        "base": {"shape": {"profile": "isotropic"}, "data": {"train": "a"}, "tokens": "1M"},
        "arms": {"plain": {}, "crown": {"shape.profile": "crown"}},
    } | changes


def read(**changes: Any) -> config.Study:
    return study_files.from_dict(source(**changes), name="s")


def test_defaults() -> None:
    study = read()
    assert (study.baseline, study.seeds, study.protocols) == ("plain", [0, 1, 2], ["params"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, "unknown key 'sedes'; did you mean seeds?"),
        ({"baseline": "plian"}, "baseline is 'plian', not an arm; did you mean plain?"),
        ({"arms": {}}, "arms is missing"),
        ({"seeds": 0}, "seeds is 0; give how many"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"protocols": ["parameters"]}, "protocols holds 'parameters'; use params, flops, time"),
        ({"margin": "wide"}, "margin is 'wide'; it must be a number above 0"),
        ({"margin": -1}, "margin is -1"),
        ({"learning_rate": "tuned"}, "learning_rate is 'tuned'; it must be shared or mup"),
        ({"sweep": [1]}, "sweep.multipliers is"),
        ({"threads": 0}, "threads is 0"),
        ({"tolerance": "wide"}, "tolerance is 'wide'; write a share such as 0.05 or 5%"),
        ({"hours": "2h"}, "hours is '2h'; it must be a number above 0"),
        ({"hours": 2}, "hours is 2, the length of runs under the protocol time, which is not in protocols"),
        ({"base": {"seed": 7}}, r"base.seed is 7, which runs do not go by; use seeds: \[7\]"),
        ({"arms": {"a": {}, "b": {"seed": 7}}}, r"arms.b.seed is 7, .* use seeds: \[7\]"),
        (
            {"sweep": {"multipliers": [1, 2], "changes": {"seed": 7}}},
            r"sweep.changes.seed is 7, .* use sweep.seeds: \[7\]",
        ),
        (
            {"arms": {"one": {}, "two": {"stages.0.tokens": "4k"}}},
            "two: stages.0.tokens: there are 0 entries, numbered from 0; '0' is not one",
        ),
        (
            {"corpora": {"c": {"sources": ["x"], "tokenizer": "t", "limit": "lots"}}},
            "corpora.c.limit is 'lots'; write a num",
        ),
        ({"downstream": {"tasks": []}}, r"downstream.tasks is \[\]"),
        ({"sweep": {"multipliers": [1, 2], "seeds": [1]}}, "sweep.seeds holds 1, a seed of the study too"),
        ({"arms": {"a/b": {}}}, "arm 'a/b' names a folder"),
        ({"corpora": {"c": {}}}, "corpora.c: sources is missing"),
        ({"corpora": {"c": {"sources": ["x"]}}}, "give either tokenizer"),
        (
            {"corpora": {"c": {"sources": ["x"], "train_tokeniser": 9}}},
            r"unknown key corpora.c.train_tokeniser; did you mean corpora.c.train_tokenizer\?",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


def test_unknown_study_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean quickstart"):
        study_files.read("quickstrat")


def test_shipped_studies_are_valid_and_survive_writing(tmp_path: Path) -> None:
    assert "quickstart" in study_files.shipped()
    for name in study_files.shipped():
        text = (
            Path(study_files.__file__).parent.joinpath("studies", f"{name}.yaml").read_text(encoding="utf-8")
        )
        sizes = list(yaml.safe_load(text).get("sizes") or ["nano", "small", "paper"])
        sizes = sizes if "\nsizes:" in text or "\nextends:" in text else [None]
        for size in sizes:
            study = study_files.read(name, size=size)
            stored = tmp_path / f"{name}.yaml"
            stored.write_text(study.to_yaml(), encoding="utf-8")
            assert study_files.read(stored) == study


def test_the_wrongly_typed_study_is_the_paper_s_but_for_its_data() -> None:
    right, wrong = (study_files.read(n, size="nano") for n in ("crown-paper", "crown-paper-typed-wrong"))
    assert wrong.corpora["mistyped"].copy_of == "prose" and wrong.corpora["prose"] == right.corpora["prose"]
    assert (wrong.arms, wrong.seeds, wrong.margin) == (right.arms, right.seeds, right.margin)
    data = wrong.base.pop("data")
    assert data["allow_corruption"] and data["train"] == "corpora/mistyped/train"
    right.base.pop("data")
    assert wrong.base == right.base
    corpora = {"bad": {"copy_of": "good", "corruption": "int32-read-as-uint16"}}
    with pytest.raises(UserError, match="a corpus above it"):
        study_files.from_dict(source(corpora=corpora), name="s")
    with pytest.raises(
        UserError, match=r"unknown key corpora.bad.spoilt; it is called corpora.bad.copy_of now"
    ):
        study_files.from_dict(source(corpora={"bad": {"spoilt": "good", "danger": "x"}}), name="s")
    with pytest.raises(
        UserError, match="extends is 'quickstrat', not a shipped study; did you mean quickstart"
    ):
        study_files.from_dict(source() | {"extends": "quickstrat"}, name="s")


def test_an_override_inside_an_arm_changes_that_key_alone(tmp_path: Path) -> None:
    """Through the recipe that the arm's runs get: the rest of the base's block stays."""
    file = tmp_path / "s.yaml"
    optimizer = {"lr": 3e-3, "betas": [0.8, 0.9]}
    base = source()["base"] | {"optimizer": optimizer}
    arms = {"a": {}, "b.2": {"optimizer": {"lr": 1e-3}}, "c": {"optimizer.weight_decay": 0.5}}
    file.write_text(yaml.safe_dump(source(base=base, arms=arms, baseline="a", sweep=[0.5, 1])))
    overrides = [
        "arms.a.optimizer.lr=5e-3",
        "arms.b.2.optimizer.lr=6e-3",
        "arms.c.optimizer.weight_decay=0.2",
    ]
    overrides += ["arms.d.optimizer.lr=7e-3", "sweep.changes.optimizer.eps=1e-9"]
    study = study_files.read(file, overrides=overrides)
    found = {n: config.changed(study.base, study.changes_of(n))["optimizer"] for n in study.arms}
    assert found == {
        "a": optimizer | {"lr": 5e-3},
        "b.2": {"lr": 6e-3},
        "c": optimizer | {"weight_decay": 0.2},
        "d": optimizer | {"lr": 7e-3},
    }
    assert study.sweep is not None
    assert study.sweep.multipliers == [0.5, 1] and study.sweep.changes == {"optimizer.eps": 1e-9}
    with pytest.raises(UserError, match="arms"):
        study_files.from_dict(source(arms={"a": 3}), name="s", changes={"arms.a.optimizer.lr": 1})


def test_dot_keys_change_a_copy() -> None:
    base = {"shape": {"profile": "isotropic", "layers": 8}}
    out = config.changed(base, {"shape.profile": "crown", "optimizer.lr": 1e-3})
    assert out == {"shape": {"profile": "crown", "layers": 8}, "optimizer": {"lr": 1e-3}}
    assert base == {"shape": {"profile": "isotropic", "layers": 8}}


def test_dot_keys_count_the_entries_of_a_list() -> None:
    base = {"stages": [{"tokens": "1k"}, {"tokens": "2k"}]}
    out = config.changed(base, {"stages.1.tokens": "4k", "stages.0.optimizer.lr": 1e-3})
    assert out == {"stages": [{"tokens": "1k", "optimizer": {"lr": 1e-3}}, {"tokens": "4k"}]}


def test_sizes_may_be_numbers_and_be_chosen_in_a_file_that_extends_another() -> None:
    sizes = {64: {"base": {"tokens": "10k"}}, 32: {"base": {"tokens": "5k"}}}
    with pytest.raises(UserError, match="choose a --size: 64, 32"):
        read(sizes=sizes)
    assert read(sizes=sizes, size=32).name == "s-32"
    assert study_files.from_dict(source(sizes=sizes), name="s", size="64").base["tokens"] == "10k"
    small = study_files.from_dict({"extends": "budgets", "size": "nano", "seeds": 1}, name="s")
    assert small.base == study_files.read("budgets", size="nano").base and small.name == "s-nano"


def test_sizes_change_the_base_and_replace_the_rest() -> None:
    sizes = {"nano": {"base": {"tokens": "10k"}, "seeds": 5}, "small": {"base": {"tokens": "10M"}}}
    study = study_files.from_dict(source(sizes=sizes), name="s", size="nano")
    assert (study.name, study.base["tokens"], study.seeds) == ("s-nano", "10k", [0, 1, 2, 3, 4])
    with pytest.raises(UserError, match="choose a --size: nano, small"):
        read(sizes=sizes)
    with pytest.raises(UserError, match="no size 'huge'; it has nano, small"):
        study_files.from_dict(source(sizes=sizes), name="s", size="huge")
