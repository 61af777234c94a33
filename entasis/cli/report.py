"""Write the page of a run, or of several side by side: loss, validation, speed, shapes. Also while they run.

examples:
  entasis report runs/tiny
  entasis report runs/tiny runs/crown --output both.html
  entasis report runs/ --json

RUN is a run's folder, or one that holds runs at any depth. The page is one file that opens offline; giving the command
again brings it up to date. A study has a report of its own (entasis study report).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from entasis.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html, or runs.html for several, in RUN)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a row for each run instead of writing the page"
    )


def run(args: argparse.Namespace) -> int:
    from entasis.train import run_page

    folders = run_page.find_runs(args.runs)
    names = [str(folder) for folder in folders]
    if len(args.runs) == 1 and len(folders) > 1:
        names = [str(folder.relative_to(args.runs[0])) for folder in folders]
    elif len({folder.resolve().name for folder in folders}) == len(folders):
        names = [folder.resolve().name for folder in folders]
    runs = [run_page.read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    if args.json:
        print(json.dumps([run_page.describe(found) for found in runs], indent=1))
        return 0
    if args.output is None and len(args.runs) > 1:
        raise UserError("--output is missing: name the page of several runs")
    page = args.output or args.runs[0] / ("report.html" if folders == args.runs else "runs.html")
    if page.suffix != ".html":
        raise UserError(f"--output is {page}; name a file that ends in .html")
    run_page.write(runs, page)
    for row in map(run_page.describe, runs):
        score = "" if row["bits_per_byte"] is None else f", {row['bits_per_byte']:.4f} bits per byte"
        print(f"{row['run']}: {row['state']}, loss {row['loss']:.4f}{score}")
    print(f"report: {page}")
    return 0
