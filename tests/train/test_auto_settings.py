"""`auto`: chosen by timing the recipe's own step, kept with the run, no slower than what is planted to be slow."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from entasis import cli
from entasis.model.attention import Attention
from entasis.train import auto_settings
from entasis.train import device as devices
from entasis.train import recipe as recipes
from entasis.train.candidates import Settings, fastest, from_plain, told
from entasis.train.resolve import resolve
from entasis.train.step_timing import Seconds

OPEN = {"precision": "auto", "compile": False, "attention": "auto"}
# Few tokens a step and many steps: long enough that 5 % of them are some steps of each candidate.
LONG = {"batch": {"tokens": 64}, "tokens": 64 * 2000, "data": {"validation": None}, **OPEN}


def chosen(recipe):
    resolved, shape, _ = resolve(recipe, 256 + 2)
    device = devices.choose_device("cpu")
    return auto_settings.choose(resolved, shape, device)


@pytest.fixture
def slow(monkeypatch):
    """Makes one implementation of attention slow in its forward pass: `slow("_sdpa")`."""

    def plant(name):
        honest = getattr(Attention, name)

        def dawdle(self, *args):
            time.sleep(0.02)
            return honest(self, *args)

        monkeypatch.setattr(Attention, name, dawdle)

    return plant


@pytest.mark.parametrize(("planted", "taken"), [("_sdpa", "plain"), ("_plain", "sdpa")])
def test_a_planted_slow_implementation_is_not_chosen(recipe, slow, planted, taken, tmp_path, capsys):
    slow(planted)
    written = tmp_path / "recipe.yaml"
    written.write_text(recipes.to_yaml(recipe(**LONG)))
    assert cli.main(["train", str(written), "--print_config"]) == 0
    assert f"attention: {taken}" in capsys.readouterr().out


def test_the_choice_and_its_timings_stand_in_the_folder_and_the_start_line_and_are_kept(
    recipe, slow, tmp_path, capsys
):
    slow("_sdpa")
    written, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    written.write_text(recipes.to_yaml(recipe(**{**LONG, "tokens": 64 * 600, "precision": "fp32"})))
    assert cli.main(["train", str(written), "--output", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "auto (attention): one step takes fp32 plain" in said and "within 5% the simpler" in said
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["attention"] == "plain" and environment["auto"]["settled"] == ["attention"]
    timed = {m.settings: m for m in map(from_plain, environment["auto"]["timings"])}
    assert set(timed) == {Settings("fp32", "sdpa", False), Settings("fp32", "plain", False)}
    # Resumed where the other is the slow one: what was chosen stays.
    (folder / "result.json").unlink()
    slow("_plain")
    assert cli.main(["train", str(written), "--output", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "plain"


def test_a_tie_takes_the_simpler():
    simple, other = Settings("fp32", "sdpa", False), Settings("bf16", "plain", False)
    assert fastest({other: [0.96, 0.96], simple: [1.0, 1.0]}) == simple
    assert fastest({other: [0.94, 0.94], simple: [1.0, 1.0]}) == other
    # Something else ran beside the medians of one.
    assert fastest({other: [0.99, 0.7], simple: [1.0, 1.0]}) == simple
    both = Settings("bf16", "plain", True)
    # Two steps of less than the margin each are together more than the margin.
    assert fastest({simple: [1.0], other: [0.96], both: [0.92]}) == both


def test_a_run_too_short_to_time_takes_the_simplest(recipe):
    settled, auto = chosen(recipe(**OPEN))
    assert (settled.precision, settled.attention, auto["timings"]) == ("fp32", "sdpa", [])


def test_steps_that_the_run_has_no_time_for_are_not_made(recipe, monkeypatch):
    """By a clock of our own, on which every step takes a second and nothing else takes any."""
    made = []

    def step(self, settings):
        made.append(settings)
        return Seconds(0.9, 0.1)

    monkeypatch.setattr(auto_settings.Step, "__call__", step)
    monkeypatch.setattr(auto_settings.time, "perf_counter", lambda: float(len(made)))
    monkeypatch.setattr(devices, "bf16_product_is_faster", lambda device: True)
    for total, candidates in ((100, 0), (130, 2), (250, 4), (1000, 4)):
        made.clear()
        _, auto = chosen(recipe(**{**LONG, "tokens": 64 * total}))
        assert len(auto["timings"]) == candidates and len(made) <= 0.05 * total


def test_the_stage_that_takes_most_of_the_run_is_timed(recipe, monkeypatch):
    timed = set()

    def step(self, settings):
        timed.add((self.span.index, self.span.shape.n_layers))
        return Seconds(0.009, 0.001)

    monkeypatch.setattr(auto_settings.Step, "__call__", step)
    grow = {"grow": {"operator": "duplicate", "after": "uniform:1"}}
    stages = [
        {"tokens": 64 * 300, "trainable": "head"},
        {"tokens": 64 * 2000, "transition": grow},
        {"tokens": 64},
    ]
    wanted = recipe(**{**LONG, "tokens": None, "stages": stages})
    layers = len(wanted.shape["layers"])
    chosen(wanted)
    assert timed == {(1, layers + 1)}
    resolved, shape, _ = resolve(wanted, 256 + 2)
    stands = auto_settings.representative(auto_settings.simplest(resolved, torch.device("cpu")), shape)
    assert 2000 < stands.steps < 2301 and stands.models == 3 - 1


def test_the_longest_sequence_of_all_stages_says_how_many_at_once(recipe):
    stages = [{"tokens": 4096}, {"tokens": 4096, "sequence": 2048}]
    shape = {**recipe().shape, "context": 2048}
    resolved, _, _ = resolve(
        recipe(shape=shape, stages=stages, tokens=None, batch={"tokens": 4096, "micro": "auto"}), 258
    )
    assert auto_settings.simplest(resolved, torch.device("cpu")).batch.micro == 2


def test_a_plan_that_measures_is_timed_as_if_all_layers_turned_out_alike(recipe):
    wanted = recipe(
        **LONG,
        training_plan={
            "importance_groups": {"importance": {"measure": "gradient", "tokens": 128}, "groups": 2}
        },
    )
    resolved, shape, _ = resolve(wanted, 256 + 2)
    stands = auto_settings.representative(auto_settings.simplest(resolved, torch.device("cpu")), shape)
    assert len(stands.spans) > len(resolved.stages)
    assert resolved.total_steps / 3 < stands.steps < 3 * resolved.total_steps


def test_a_short_run_compiles_nothing(recipe):
    settled, auto = chosen(recipe(**{**LONG, "compile": "auto", "tokens": 64 * 500, "precision": "fp32"}))
    assert settled.compile is False and auto["timings"]
    assert not any(timing["compile"] for timing in auto["timings"])


@pytest.mark.slow
@pytest.mark.skipif(not devices.has_compiler(devices.choose_device("cpu")), reason="no C++ compiler")
def test_a_long_run_times_compiled_steps_too(recipe):
    long = recipe(**{**LONG, "compile": "auto", "tokens": 10**9, "precision": "fp32", "attention": "sdpa"})
    settled, auto = chosen(long)
    timed = {t["compile"]: t for t in auto["timings"]}
    assert set(timed) == {False, True} and timed[True]["compilation"] > 0
    assert settled.compile is (timed[True]["fastest"] < 0.95 * timed[False]["fastest"])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_time_together_and_agree(recipe, tmp_path):
    written = tmp_path / "recipe.yaml"
    written.write_text(recipes.to_yaml(recipe(**{**LONG, "batch": {"tokens": 128}, "tokens": 128 * 20_000})))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "entasis", "train", str(written), "--output", str(tmp_path / "run")]
    told = tmp_path / "run/environment.json"
    # The run is long so that there is time for the choice; it is ended when that is made.
    running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        while running.poll() is None and not told.exists():
            time.sleep(0.2)
    finally:
        running.terminate()
        running.wait()
    environment = json.loads(told.read_text())
    assert environment["world"] == 2 and len(environment["auto"]["timings"]) >= 2


def test_the_start_line_orders_by_speed():
    rows = [
        {"precision": "bf16", "attention": "sdpa", "compile": False, "fastest": 0.079, "median": 0.08,
         "compilation": 0.0, "rounds": 7},
        {"precision": "fp32", "attention": "plain", "compile": True, "fastest": 1.5, "median": 2.0,
         "compilation": 30.0, "rounds": 7},
    ]  # fmt: skip
    assert told(rows) == "bf16 sdpa 79 ms, fp32 plain compiled 1.5 s"
