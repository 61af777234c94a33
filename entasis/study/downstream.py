"""Downstream scores of a study's runs: lm-eval tasks after training (the extra `eval`).

downstream: {tasks: [next_line], include_path: tasks/, continuation: {items: 200}}

`continuation` is made once, in the study's folder, of its own held-out documents. The scores stand beside bits per byte and do
not decide the verdict: at the sizes of a study most tasks are at chance.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from entasis.errors import UserError
from entasis.files import hash_of, write_text
from entasis.report.tables import Column, Table
from entasis.study import results, statistics
from entasis.study.arms import Arm
from entasis.study.config import Downstream, Study
from entasis.study.executors import launchers
from entasis.study.executors.launchers import Pool
from entasis.study.plan import Plan
from entasis.study.results import Outcome

FILE = "downstream.json"
ASKED = "downstream.asked.json"
"""Beside it: of each task the hash of what was asked, its limit and its definition."""
FOLDER = "tasks"
"""Where the study's own task lies."""
CONTINUATION = "continuation"
MISSING = (
    "Tasks need lm-eval (pip install 'entasis[eval]'); once it is there, the same command scores the runs."
)


def prepare(study: Study, folder: Path, arms: Mapping[str, Arm], console: Console) -> None:
    """Before anything is trained: makes the task of the study's own text, and says where lm-eval is not installed.

    Its documents are those that the arms are judged on, never those that a sweep chooses by. Raises `UserError` where they are
    too few, and for a continuation that some model could not read at once.
    """
    if study.downstream is None:
        return
    if importlib.util.find_spec("lm_eval") is None:
        console.print(f"downstream: left out. {MISSING}", markup=False, highlight=False, soft_wrap=True)
    if (wanted := study.downstream.continuation) is None:
        return
    from entasis.data.continuations import texts_of, write_task

    text = folder / str(arms[study.baseline].recipe["data"]["validation"])
    write_task(
        texts_of(text, part="test" if study.sweep else "all"),
        folder / FOLDER,
        where=f"study {study.name}: downstream.continuation: {text}",
        name=CONTINUATION,
        **wanted.model_dump(),
    )
    _check_lengths(study, folder, arms)


def _check_lengths(study: Study, folder: Path, arms: Mapping[str, Arm]) -> None:
    from entasis.data import tokenizer
    from entasis.data.corpus import TOKENIZER

    lines = (folder / FOLDER / f"{CONTINUATION}.jsonl").read_text(encoding="utf-8").splitlines()
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    longest: dict[str, int] = {}
    for arm in (arms[name] for name in study.arms):
        path = str(arm.recipe["data"]["validation"])
        if path not in longest:
            longest[path] = max(map(len, tokenizer.load(folder / path / TOKENIZER).encode_batch(choices)))
        if longest[path] > arm.final_shape.context:
            raise UserError(
                f"study {study.name}: downstream.continuation: a continuation has {longest[path]} tokens, the context of arm "
                f"{arm.name} {arm.final_shape.context}; ask for fewer words (continuation.continuation)"
            )


def score(study: Study, folder: Path, done: Sequence[Outcome], console: Console, pool: Pool) -> bool:
    """Adds the tasks that a run has not answered to `downstream.json` in its folder: task → metric → value.

    Answers to other questions than are asked now are forgotten first, in all runs, so that none are compared with these.
    As many runs at once as are trained at once. Returns whether there were any.
    """
    wanted = study.downstream
    if wanted is None or importlib.util.find_spec("lm_eval") is None:
        return False
    own = [] if wanted.continuation is None else [CONTINUATION]
    paths = [str(folder / FOLDER)] if own else []
    paths += [wanted.include_path] if wanted.include_path else []
    asked = {task: _question(task, wanted, folder) for task in [*wanted.tasks, *own]}
    for o in done:
        _forget_others(o.folder, asked)
    left = [(o.folder, tasks) for o in done if (tasks := [t for t in asked if t not in _answers(o.folder)])]
    if not left:
        return False
    told = -1

    def tell() -> None:
        nonlocal told
        if (count := sum(_answers(run).keys() >= set(tasks) for run, tasks in left)) != told:
            told = count
            console.print(f"downstream: {told} of {len(left)} runs scored", markup=False, highlight=False)

    launchers.share(pool, "downstream", _score, left, paths, wanted.limit, asked, told=tell)
    tell()
    return True


def _question(task: str, wanted: Downstream, folder: Path) -> str:
    """A hash of what a task asks: how many questions, and the files of one's own that it is made of."""
    files = (
        [folder / FOLDER / f"{CONTINUATION}.jsonl"] if task == CONTINUATION and wanted.continuation else []
    )
    if not files and wanted.include_path:
        files = _files_of(task, sorted(Path(wanted.include_path).rglob("*.yaml")))
    told = json.dumps([wanted.limit, *map(hash_of, files)])
    return hashlib.sha256(told.encode()).hexdigest()


def _files_of(task: str, sources: Sequence[Path]) -> list[Path]:
    """The files that define a task: its YAML, what that names of items and functions, and the tasks of a group."""
    named: dict[str, list[Path]] = {}
    for path in sources:
        head = re.findall(
            r"^(?:task|group|tag):[ \t]*(\S.*?)[ \t]*$", path.read_text("utf-8", "replace"), re.M
        )
        for name in head:
            named.setdefault(name.strip("'\""), []).append(path)
    found: set[Path] = set()
    left = list(named.get(task, []))
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for word in _words(path) if path.suffix == ".yaml" else ():
            if len(word) > 200:
                continue  # no file has such a name, and looking for one raises
            # A file beside it, a function in a module beside it, another task.
            beside = [path.parent / word, path.parent / f"{word.split('.')[0]}.py"]
            left += [p for p in beside if p.is_file()] + named.get(word, [])
    return sorted(found)


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's `!function module.name` as the text it is."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: str(node.value))


def _words(path: Path) -> Iterator[str]:
    """Every text in a YAML file; none in one that is not YAML, which lm-eval refuses itself."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from walk(inner)

    try:
        yield from walk(yaml.load(path.read_text("utf-8", "replace"), _Loader))
    except yaml.YAMLError:
        return


def _forget_others(run: Path, asked: Mapping[str, str]) -> None:
    """Removes a run's answers where some of them are to other questions than those asked now."""
    known = results.json_of(run / ASKED) if (run / ASKED).is_file() else {}
    if any(known.get(task) != asked[task] for task in _answers(run) if task in asked):
        (run / FILE).unlink()


def _score(
    left: Sequence[tuple[Path, list[str]]], paths: list[str], limit: int | None, asked: Mapping[str, str]
) -> None:
    """Of each run the tasks, in a worker."""
    from entasis.evaluate import harness
    from entasis.evaluate.loading import load

    for run, tasks in left:
        answer = harness.run(load(run, device="auto"), tasks, include_path=paths, limit=limit)
        plain: dict[str, dict[str, float]] = {
            task: {
                name.removesuffix(",none"): float(value)
                for name, value in values.items()
                if isinstance(value, float) and "stderr" not in name
            }
            for task, values in answer["results"].items()
        }
        # What stands for several tasks has no score of its own, and was asked all the same.
        plain = {**_answers(run), **{task: {} for task in tasks}, **plain}
        write_text(run / FILE, json.dumps(plain, indent=1) + "\n")
        # After the answers: those of a process that is killed in between are asked for again.
        known = results.json_of(run / ASKED) if (run / ASKED).is_file() else {}
        told = known | {task: asked[task] for task in tasks}
        write_text(run / ASKED, json.dumps(told, indent=1) + "\n")


def _answers(run: Path) -> dict[str, dict[str, float]]:
    path = run / FILE
    return results.json_of(path) if path.is_file() else {}


def table(plan: Plan, done: Mapping[str, Outcome], baseline: str) -> Table:
    """One row a protocol, task, metric and arm: mean over seeds, paired difference to the baseline, its 95 % interval."""
    rows: list[dict[str, Any]] = []
    for protocol, grid in plan.grid.items():
        found = {
            arm: {run.seed: _answers(done[run.folder].folder) for run in runs if run.folder in done}
            for arm, runs in grid.items()
        }
        measured = sorted(
            {(t, m) for seeds in found.values() for r in seeds.values() for t in r for m in r[t]}
        )
        for task, metric in measured:
            values = {
                arm: {s: r[task][metric] for s, r in seeds.items() if metric in r.get(task, {})}
                for arm, seeds in found.items()
            }
            row = {"protocol": protocol, "task": task, "metric": metric}
            rows += [
                row | _row(arm, scores, {} if arm == baseline else values[baseline])
                for arm, scores in values.items()
                if scores
            ]
    return Table(
        [
            *([Column("protocol", "protocol")] if len(plan.grid) > 1 else []),
            Column("task", "task"),
            Column("metric", "metric"),
            Column("arm", "arm"),
            Column("mean", "score", ".4f", "mean of seeds"),
            Column("seeds", "seeds"),
            Column("difference", "difference", "+.4f", f"to {baseline}"),
            Column("low", "95 % from", "+.4f", "paired by seed"),
            Column("high", "to", "+.4f"),
        ],
        rows,
    )


def _row(arm: str, scores: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": arm,
        "mean": float(np.mean(list(scores.values()))),
        "seeds": len(scores),
    }
    if pairs := [scores[s] - baseline[s] for s in scores if s in baseline]:
        mean, low, high, _ = statistics.paired_interval(pairs)
        row["difference"] = mean
        # Accuracies go in steps of an item: seeds that agree to the last item have no spread to go by, which is no certainty.
        if high > low:
            row |= {"low": low, "high": high}
    return row
