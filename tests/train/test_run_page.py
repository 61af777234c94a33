import html
import json
import shutil

import pytest

from entasis.cli import main
from entasis.train import resolved_recipe as recipes
from entasis.train.run import train


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """A finished run, and one as it was before it was finished."""
    folder = tmp_path_factory.mktemp("runs")
    train(recipe(evaluation={"every": 4, "tokens": 2000}), folder / "whole")
    shutil.copytree(folder / "whole", folder / "deep" / "part")
    (folder / "deep" / "part" / "result.json").unlink()
    lines = (folder / "deep" / "part" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "deep" / "part" / "metrics.jsonl").write_text("".join(lines[:6]) + '{"step": 7, "lo')
    return folder


def test_rows_say_what_the_runs_recorded(runs, capsys):
    assert main(["report", str(runs), "--json"]) == 0
    part, whole = json.loads(capsys.readouterr().out)
    result = json.loads((runs / "whole/result.json").read_text())
    assert (whole["run"], whole["state"]) == ("whole", "finished")
    assert whole["bits_per_byte"] == result["validation"]["bits_per_byte"]
    assert whole["loss"] == result["loss"] and whole["parameters"] == result["parameters"]
    steps = recipes.read_stored(runs / "whole/recipe.yaml").total_steps
    assert (part["run"], part["state"]) == ("deep/part", f"step 6 of {steps}")  # its last line was cut off
    rows = [json.loads(line) for line in (runs / "whole/metrics.jsonl").read_text().splitlines()]
    assert part["bits_per_byte"] == rows[3]["validation_bits_per_byte"]


def test_a_run_that_measures_tells_how_far_it_is_of_the_whole(recipe, tmp_path, capsys):
    plan = {"autofreeze": {"looks": 3, "tokens": 64}}
    train(recipe(training_plan=plan), tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "step 8 of 8"
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    more = {**json.loads(lines[-1]), "step": 9}  # what a plan that spends FLOPs may come to
    (tmp_path / "run/metrics.jsonl").write_text("".join([*lines, json.dumps(more) + "\n"]))
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "step 9, past the 8 expected"


def test_the_page_holds_every_run_and_is_brought_up_to_date(runs, tmp_path, capsys):
    for _ in range(2):
        assert (
            main(["report", str(runs / "whole"), str(runs / "deep"), "--output", str(tmp_path / "p.html")])
            == 0
        )
    page = (tmp_path / "p.html").read_text()
    assert "1 of 2 runs finished" in page and "no study" in page
    charts = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    assert len(charts) == 5
    told = capsys.readouterr().out
    assert f"report: {tmp_path / 'p.html'}" in told


def test_a_lone_run_has_its_page_in_its_folder_and_still_answers(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Finished: loss" in (tmp_path / "run/report.html").read_text()
    assert main(["train", str(tmp_path / "run/recipe.yaml"), "--output", str(tmp_path / "run")]) == 0


def test_the_texts_of_a_run_are_on_its_page(recipe, tmp_path):
    train(recipe(tokens=1024, samples={"every": 1, "prompts": ["x < "], "tokens": 4}), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text()
    for step, row in enumerate(rows, 1):
        assert html.escape(f"step {step}: {row['samples'][0]}") in page


def test_metrics_of_a_finished_run_that_are_cut_short_are_told(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    assert main(["report", str(tmp_path / "run")]) == 0
    told = f"damaged: {path} was changed after the run"
    assert told in capsys.readouterr().err and told in (tmp_path / "run/report.html").read_text()
    path.unlink()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert f"damaged: {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}"], "no run here"),
        (["{runs}/whole", "{runs}/deep"], "--output is missing"),
        (["{runs}/whole", "--output", "{tmp}/page.pdf"], "ends in .html"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, arguments, says):
    assert main(["report", *(a.format(tmp=tmp_path, runs=runs) for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
