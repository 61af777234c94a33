"""Train arms against each other at equal cost, with paired seeds, and judge them.

entasis study run quickstart                  run (or go on with) a study; a file or a shipped name
entasis study plan where-capacity-belongs --size nano --noise 0.004     what it would cost and could show
entasis study resume studies/quickstart       go on with what a folder holds
entasis study run FILE --launcher slurm --option slurm_partition=gpu --option gpus_per_node=1
entasis study report studies/quickstart       judge and report what is finished
entasis study compare studies/a studies/b     two studies side by side
entasis study scale studies/a studies/b studies/c     compute multipliers over three budgets or more
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entasis.cli import overrides
from entasis.cli.numbers import real
from entasis.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from entasis.report.tables import Table
    from entasis.study.config import Study
    from entasis.study.verdict import Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help_text in (
        ("run", "run a study, or go on with it"),
        ("plan", "print its grid and its price"),
    ):
        action = actions.add_parser(name, help=help_text, epilog="Any key can be set: seeds=5 base.tokens=2M")
        action.add_argument("study", help="a YAML file, or the name of a shipped study")
        overrides.accept(action, dashes=False)
        action.add_argument("--size", help="one of the study's sizes")
        action.add_argument(
            "--output", type=Path, metavar="DIR", help="the study's folder (default: studies/NAME)"
        )
        action.add_argument("--json", action="store_true", help="print the answer as JSON")
        if name == "run":
            _add_launcher(action)
        if name == "plan":
            action.add_argument("--noise", type=real(0, open=True), metavar="SD",
                                help="sd of a paired difference in bits per byte, if known")  # fmt: skip
            action.add_argument("--quick", action="store_true",
                                help="take the time from the matmul ceiling instead of timing steps of every shape")  # fmt: skip
    for name, help_text in (
        ("resume", "go on with the study in a folder"),
        ("report", "judge and report what is in a folder"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("folder", type=Path)
        if name == "resume":
            _add_launcher(action)
        action.add_argument("--json", action="store_true", help="print the verdict as JSON")
    action = actions.add_parser(
        "compare", help="set two studies side by side, and say what differs between them"
    )
    action.add_argument("folders", type=Path, nargs=2, metavar="DIR")
    action.add_argument("--json", action="store_true", help="print the rows as JSON")
    action = actions.add_parser("scale", help="fit studies of growing budgets: compute multipliers")
    action.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    action.add_argument("--json", action="store_true", help="print the fit as JSON")


def _add_launcher(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--launcher",
        default="local",
        help="local (this machine), slurm or ray; the study's folder must be seen by all machines",
    )
    action.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the launcher: submitit's parameters and cluster, at_once; Ray's address, cpus, gpus",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(stderr=args.json)
    if not console.is_terminal:
        console.width = 160  # in a file or a pipe no table need be cut
    return {
        "run": _run,
        "resume": _run,
        "plan": _plan,
        "report": _report,
        "compare": _compare,
        "scale": _scale,
    }[args.action](args, console)


def _run(args: argparse.Namespace, console: Console) -> int:
    from entasis.study import growth, runner

    if args.action == "resume":
        study, folder = growth.stored(args.folder), args.folder
    else:
        study = _study(args)
        folder = args.output or Path("studies", study.name)
    options = dict(_pair(text) for text in args.option)
    verdict = runner.run(study, folder, console, launcher=args.launcher, options=options)
    _show(verdict, folder, args, console)
    return 1 if verdict.failed else 0


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--option {text!r}: write KEY=VALUE")
    return key, value


def _report(args: argparse.Namespace, console: Console) -> int:
    from entasis.study import runner

    _show(runner.report(args.folder, console), args.folder, args, console)
    return 0


def _plan(args: argparse.Namespace, console: Console) -> int:
    from entasis.study import cost_estimate

    study = _study(args)
    estimate = cost_estimate.estimate(
        study, args.output or Path("studies", study.name), noise=args.noise, quick=args.quick
    )
    if args.json:
        print(json.dumps(estimate, indent=1))
    else:
        cost_estimate.show(estimate, console)
    return 0


def _compare(args: argparse.Namespace, console: Console) -> int:
    from entasis.study import compare

    return _tell(*compare.compare(*args.folders), args, console)


def _scale(args: argparse.Namespace, console: Console) -> int:
    from entasis.study import scaling

    return _tell(*scaling.scale(args.folders), args, console)


def _tell(plain: Any, table: Table, notes: list[str], args: argparse.Namespace, console: Console) -> int:
    """A finished comparison: as JSON, or as its table with remarks."""
    if args.json:
        print(json.dumps(plain, indent=1))
        return 0
    console.print(table.rich())
    for note in notes:
        console.print(note, markup=False, highlight=False)
    return 0


def _study(args: argparse.Namespace) -> Study:
    from entasis.study import study_files

    return study_files.read(args.study, size=args.size, overrides=args.set)


def _show(verdict: Verdict, folder: Path, args: argparse.Namespace, console: Console) -> None:
    from entasis.study import runner
    from entasis.study.verdict import plain

    if args.json:
        print(json.dumps(plain(verdict), indent=1))
        return
    runner.summary(verdict, console)
    console.print(f"report: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
