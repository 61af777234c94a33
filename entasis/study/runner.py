"""A study from its file to its report: corpora, shapes, runs, verdict.

    entasis study run quickstart

The folder holds everything and can be moved:

    study.yaml  machine.json  throughput.json  corpora/  sweep/  runs/ARM/seed-0/  logs/
    verdict.json  report.html  tables/*.csv *.tex  charts/*.svg *.pdf
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from entasis import signals
from entasis.errors import Damaged, Failure, UserError
from entasis.files import format_bytes
from entasis.study import (
    analysis,
    downstream,
    growth,
    held_out,
    live_table,
    machine,
    results,
    rounds,
    stopping,
    throughput,
    trunks,
    verdict_tables,
)
from entasis.study import verdict as verdicts
from entasis.study.arms import Arm, Findings
from entasis.study.config import Study
from entasis.study.executors import launchers, local
from entasis.study.executors.launchers import Pool
from entasis.study.plan import Plan, PlannedRun, lay_out, preparatory, solve
from entasis.study.verdict import Verdict

_PATH = re.compile(r"(stages\.(\d+\.)?)?data\.(train|validation)(\.[^.]+\.path)?|start\.from")
"""Keys of a recipe that name a folder."""
_FONT = "shape.interface.font"
_IMPORTANCE = re.compile(r"training_plan\.[^.]+\.importance")
"""May name a file of numbers for the layers, which the study then holds itself."""


def run(
    study: Study,
    folder: Path,
    console: Console,
    *,
    launcher: str = "local",
    options: Mapping[str, str] | None = None,
) -> Verdict:
    """Runs what is not there yet and judges what is.

    `launcher` is local (processes on this machine), slurm or ray; `options` are its own.

    Raises `UserError` for a folder that holds another study, `Failure` when no run could be finished.
    """
    folder = folder.resolve()
    study = at_home(study)
    place = launchers.find(launcher)(folder / "logs", study.threads, options or {})
    try:
        return _run(study, folder, console, place)
    except KeyboardInterrupt as error:
        raise Failure(
            f"stopped by {signals.name_of(error)}; `entasis study resume {folder}` goes on from there"
        ) from None


def _run(
    study: Study,
    folder: Path,
    console: Console,
    place: contextlib.AbstractContextManager[Pool],
) -> Verdict:
    # Refused before anything is touched: a study.yaml that cannot run would keep the mended one out of the folder.
    _check(growth.intended(study, folder)[0], folder)
    with local.only_one(folder), contextlib.ExitStack() as held:
        study, notes = growth.begin(study, folder)
        pool = held.enter_context(place)  # which may write into the folder
        if "time" in study.protocols and pool.shares_gpus:
            raise UserError(
                f"study {study.name}: under time runs are as long as they are fast, alone on their GPU; with these "
                "options several share one"
            )
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        _prepare(study, folder, console)
        study = _settled(study, folder, console, pool)
        arms = held_out.agree(study, folder, solve(study, vocabulary(study, folder)))
        downstream.prepare(study, folder, arms, console)
        prepared = preparatory(study, arms)
        _recognise(folder, arms, [*trunks.needed(prepared), *prepared])
        late = [run.folder for run in results.too_late(study, folder, prepared)]
        if late:
            told = f"not tried again, as runs have begun at the rate chosen without: {', '.join(late)}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)
        _say_disk(study, folder, arms, console)
        wanted = [run for run in prepared if run.folder not in late]
        _train(study, folder, wanted, console, "preparing: learning rates", pool)
        if "time" in study.protocols and not study.arms.keys() <= throughput.rounds(folder).keys():
            console.print("measuring the throughput of all arms in turn", markup=False, highlight=False)
            throughput.measure(study, folder, arms, pool)
        plan = _lay_out(study, folder, arms, prepared)
        rounds.train(
            study, plan, folder, lambda runs: _train(study, folder, runs, console, study.title, pool)
        )
        done = list(results.outcomes(folder, plan.runs).values())
        scored = downstream.score(study, folder, done, console, pool)
        verdict = analysis.judge(study, plan, folder)
        if not scored and verdicts.holds(folder, verdict) and (folder / "report.html").is_file():
            return verdict
        return _report(study, plan, folder, verdict, prepared, console)


def report(folder: Path, console: Console) -> Verdict:
    """Judges and reports what is in a study's folder, without running anything."""
    folder = folder.resolve()
    study = machine.applied(growth.stored(folder), folder)
    arms = held_out.agree(study, folder, solve(study, vocabulary(study, folder)))
    prepared = preparatory(study, arms)
    _recognise(folder, arms, [*trunks.needed(prepared), *prepared])
    plan = _lay_out(study, folder, arms, prepared)
    return _report(study, plan, folder, analysis.judge(study, plan, folder), prepared, console)


def foreseen(
    study: Study, folder: Path, expected: Mapping[str, float] | None = None
) -> tuple[dict[str, Arm], list[PlannedRun], Plan]:
    """The arms, the runs before the main grid, and the main grid, as far as can be told now. Raises `UserError`.

    `expected` are tokens per second of each arm, taken until they are measured.
    """
    arms = held_out.agree(study, folder, solve(study, _expected_vocabulary(study, folder)))
    prepared = preparatory(study, arms)
    speeds = throughput.speeds(folder)
    if not study.arms.keys() <= speeds.keys():
        # Until speeds are measured, all arms in turn, equal time is taken as equal FLOPs.
        equal = {name: 1e12 / arm.flops_per_token for name, arm in arms.items()}
        speeds = dict(expected or equal)
    rates = results.findings(study, folder, prepared, speeds).multiplier
    return arms, prepared, lay_out(study, arms, Findings(multiplier=rates, tokens_per_second=speeds))


def _check(study: Study, folder: Path) -> None:
    """Refuses what can be seen to be wrong before corpora are made and anything is trained. Raises `UserError`."""
    _, _, plan = foreseen(study, folder)
    if study.until is not None:
        stopping.schedule(study.until, max(1, len(set(plan.comparisons(study).values()))))


def vocabulary(study: Study, folder: Path) -> int | None:
    """The corpus's vocabulary, if the corpus is there already."""
    path = _training_corpus(study)
    corpus = folder / str(path)  # an absolute path stays itself
    if path is None or not (corpus / "corpus.json").is_file():
        if path is not None and any(folder.glob("*/*/*/recipe.yaml")):
            raise Damaged(
                f"damaged: {corpus / 'corpus.json'} is missing; the study's runs were trained on it"
            )
        return None
    from entasis.data.corpus import Corpus

    return Corpus(corpus).vocabulary


def _expected_vocabulary(study: Study, folder: Path) -> int | None:
    """As `vocabulary`; of a corpus that the study has still to make, that of the tokenizer it will have."""
    from entasis.study import corpora

    name = (re.match(r"corpora/([^/]+)/", str(_training_corpus(study))) or [None, ""])[1]
    if name not in corpora.missing(study, folder):
        return vocabulary(study, folder)
    corpus = study.corpora[name]
    while corpus.copy_of:
        corpus = study.corpora[corpus.copy_of]
    if corpus.train_tokenizer:
        return corpus.train_tokenizer
    from entasis.data import tokenizer

    return tokenizer.load(str(corpus.tokenizer)).vocabulary


def _training_corpus(study: Study) -> Any:
    """The path of the corpus that the base trains on; None where it names none."""
    path = (study.base.get("data") or {}).get("train")
    if isinstance(path, Mapping):  # a mixture, whose corpora have one tokenizer
        return next((part.get("path") for part in path.values() if isinstance(part, Mapping)), None)
    return path


def summary(verdict: Verdict, console: Console) -> None:
    """The answer in the terminal."""
    for protocol in verdict.protocols:
        console.print(verdict_tables.main_table(verdict, protocol).rich())
        if verdict.protocols[protocol].contrasts:
            console.print(verdict_tables.contrast_table(verdict, protocol).rich())
    for name, message in verdict.failed.items():
        console.print(f"failed {name}: {message}", markup=False, highlight=False, style="red")
    console.print(verdict.sentence, markup=False, highlight=False, style="bold")


def at_home(study: Study) -> Study:
    """The study with paths outside its folder made absolute, so that it runs the same from anywhere.

    Of a file of importances it takes the numbers.
    """
    from entasis.train.training_plans.plan import read_importance

    own = tuple(f"corpora/{name}/" for name in study.corpora)

    def absolute(value: Any, key: str = "") -> Any:
        """`value`, which stands at the dot-key `key` of a recipe, with its paths made absolute."""
        if isinstance(value, dict):
            return {k: absolute(v, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
        if isinstance(value, list):
            return [absolute(v, key) for v in value]
        if not isinstance(value, str):
            return value
        if _PATH.fullmatch(key):
            return value if own and value.startswith(own) else str(Path(value).absolute())
        if key == _FONT and Path(value).is_file():
            return str(Path(value).absolute())
        if _IMPORTANCE.fullmatch(key) and Path(value).is_file():
            return read_importance(value)
        return value

    corpora = {
        name: corpus.replaced(
            sources=[str(Path(s).absolute()) if Path(s).exists() else s for s in corpus.sources],
        )
        for name, corpus in study.corpora.items()
    }
    tasks = study.downstream
    if tasks and tasks.include_path:
        tasks = tasks.replaced(include_path=str(Path(tasks.include_path).absolute()))
    return study.replaced(
        base=absolute(study.base),
        arms={name: absolute(changes) for name, changes in study.arms.items()},
        trunks={name: absolute(changes) for name, changes in study.trunks.items()},
        corpora=corpora,
        downstream=tasks,
    )


def _prepare(study: Study, folder: Path, console: Console) -> None:
    from entasis.data import left_out
    from entasis.data.corpus import Corpus
    from entasis.study import corpora

    names = corpora.missing(study, folder)
    if names:
        with live_table.preparing(console, f"preparing corpus {', '.join(names)}") as progress:
            skipped = corpora.make(study, folder, progress)
        for name, reasons in skipped.items():
            for line in left_out.lines(reasons):
                told = f"corpus {name}: {line}"
                console.print(told, markup=False, highlight=False, soft_wrap=True)
        for name in names:
            if lost := left_out.lost_by_tokenizer(Corpus(folder / "corpora" / name / "train").text_lost):
                console.print(f"corpus {name}: {lost}", markup=False, highlight=False, soft_wrap=True)


def _settled(study: Study, folder: Path, console: Console, pool: Pool) -> Study:
    """The study with every `auto` settled, once for all its runs."""
    if not machine.settled(study, folder):
        console.print("timing the settings left to auto", markup=False, highlight=False)
        arms = solve(study, vocabulary(study, folder))
        console.print(machine.settle(study, folder, arms, pool), markup=False, highlight=False)
    return machine.applied(study, folder)


def _say_disk(study: Study, folder: Path, arms: Mapping[str, Arm], console: Console) -> None:
    """Says it where the disk has no room for the runs that are left."""
    _, prepared, plan = foreseen(study, folder)
    runs = [*prepared, *rounds.wanted(study, plan, folder).runs]
    left = [r for r in [*trunks.needed(runs), *runs] if not launchers.finished(folder, r)]
    need, free = sum(arms[run.arm].disk_bytes for run in left), shutil.disk_usage(folder).free
    if need > free:
        console.print(
            f"the {len(left)} runs that are left take about {format_bytes(need)} of disk, and {format_bytes(free)} are free; "
            "a study begun with base.checkpoint.keep_last=1 keeps least",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _train(
    study: Study,
    folder: Path,
    runs: Sequence[PlannedRun],
    console: Console,
    title: str,
    pool: Pool,
) -> None:
    left = [r for r in runs if not launchers.finished(folder, r)]
    if not left:
        return
    _train(study, folder, trunks.needed(left), console, "what arms start from", pool)
    with live_table.watching(console, title) as watch:
        states = launchers.execute(folder, runs, pool, watch)
    failed = [s for s in states if s.status == "failed"]
    if len(failed) == len(left) and not any(s.status == "done" for s in states):
        raise Failure(f"every run failed; the first, {failed[0].run.folder}: {failed[0].message}")
    for state in failed:
        console.print(
            f"failed {state.run.folder}: {state.message}", markup=False, highlight=False, style="red"
        )


def _lay_out(study: Study, folder: Path, arms: dict[str, Arm], prepared: Sequence[PlannedRun]) -> Plan:
    found = results.findings(study, folder, prepared, throughput.speeds(folder))
    for arm in study.arms:
        if study.sweep and arm not in study.controls and arm not in found.multiplier:
            raise Failure(f"study {study.name}: no run of the learning-rate sweep of {arm} was finished")
        if "time" in study.protocols and arm not in found.tokens_per_second:
            raise Failure(f"study {study.name}: the throughput of {arm} could not be measured")
    plan = lay_out(study, arms, found)
    _recognise(folder, arms, [*trunks.needed(plan.runs), *plan.runs])
    return plan


def _recognise(folder: Path, arms: Mapping[str, Arm], runs: Sequence[PlannedRun]) -> None:
    """Sees to it that the runs there are those that the study plans. Raises `UserError`."""
    from entasis.train import recipe, run_folder
    from entasis.train.resolve import resolve
    from entasis.train.training_data import weighed

    for run in runs:
        if not (folder / run.folder / "recipe.yaml").is_file():
            continue
        # A trunk's run may be gone, and would not be found from here.
        before = arms[run.needs.arm].stages[-1] if run.needs else None
        written = weighed(recipe.from_dict(run.recipe), folder)
        wanted, _, _ = resolve(written, run.recipe["shape"]["vocabulary"], before)
        try:
            run_folder.recognise(wanted, folder / run.folder)
        except Damaged:
            raise
        except UserError as error:
            told = str(error).removesuffix("; choose another --output")
            raise UserError(
                f"{told}: study.yaml has changed since it ran; undo that, or run the new study in another folder"
            ) from error


def _report(
    study: Study, plan: Plan, folder: Path, verdict: Verdict, prepared: Sequence[PlannedRun], console: Console
) -> Verdict:
    from entasis.study import report as page

    console.print("writing the report", markup=False, highlight=False)
    page.write(study, plan, folder, verdict, prepared)
    return verdict
