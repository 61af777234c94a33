"""Dissect a trained model: what each of its layers does, with intervals and controls.

examples:
  entasis anatomy runs/tiny --text corpora/stdlib/validation
  entasis anatomy imported/smollm2 --text books/ --tokens 100k --measures ablation,structure --output anatomy/smollm2
  entasis anatomy imported/smollm2 --text books/ --layers 8,11,14 --measures recovery --sequence 128
  entasis anatomy runs/tiny --text book.txt --suggest profile --budget 180M
  entasis anatomy runs/tiny --text corpora/stdlib/train --suggest plan --budget 5M
  entasis anatomy runs/tiny --text corpora/stdlib/train --suggest importance --output anatomy/tiny

Prints a table of the layers; with --output also anatomy.json and report.html, and what is done is kept there, so the
same command goes on where it was stopped. The model is a finished run, an imported model, a Hugging Face folder or a
GGUF file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from entasis.cli.numbers import amount, real, seed, whole
from entasis.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from entasis.evaluate.loading import Loaded

TAKES = {
    "profile": ("budget", "importance", "spread", "scale"),
    "plan": ("budget", "importance"),
    "importance": ("importance",),
}
"""Which options each suggestion knows."""
FILES = {"profile": "profile.yaml", "plan": "plan.yaml", "importance": "importance.json"}
"""What each is called in the output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--text", metavar="PATH", required=True, help="a corpus, a text file or a folder of them"
    )
    parser.add_argument("--column", default="text", help="the text's key in jsonl and parquet (text)")
    parser.add_argument(
        "--measures",
        default="structure,skip",
        help="names of measures, or loss, structure, ablation, manipulation, predictability, recovery, all",
    )
    parser.add_argument(
        "--tokens", type=amount(2), default="20k", help="about how much of the text to read (20k)"
    )
    parser.add_argument(
        "--sequence", type=whole(1), help="tokens read at once (the model's context, at most 512)"
    )
    parser.add_argument(
        "--layers", metavar="L,L", help="the layers to ablate, manipulate and train, such as 0,8,11 (all)"
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16: several times as fast where the processor has units for it, and less exact",
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--output", metavar="DIR")
    parser.add_argument(
        "--suggest",
        choices=["profile", "plan", "importance"],
        help="a shape whose widths follow the layers' importance, a recipe that trains the important layers first, or the "
        "importance itself as a training plan reads it",
    )
    parser.add_argument("--budget", help="of the suggestion: parameters of a profile, tokens of a plan")
    parser.add_argument("--importance", metavar="QUANTITY", help="what the suggestion follows (skip)")
    parser.add_argument(
        "--spread", type=real(0, 1), help="of a profile: widths from 1 − SPREAD to 1 + SPREAD (0.3)"
    )
    parser.add_argument(
        "--scale", choices=["ffn", "heads", "both"], help="what a profile makes unequal (ffn)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="all values, as one JSON object")


def run(args: argparse.Namespace) -> int:
    import numpy as np
    import torch
    from rich.console import Console

    from entasis import progress
    from entasis.anatomy import runner, suggest, summary
    from entasis.anatomy.measures import choose, leave_out_impossible
    from entasis.evaluate.loading import load
    from entasis.files import write_text

    _check_suggestion(args)
    names = args.measures.split(",")
    measures = choose(["loss", *names])
    # Differences between layers may be small: bf16 weights are computed in fp32.
    loaded = load(args.model, device=args.device, dtype=torch.float32)
    measures = leave_out_impossible(measures, names, loaded.shape)
    if args.suggest:
        quantity = suggest.choose_quantity(measures, args.importance)
        # What does not depend on the importance is refused before it is measured.
        _suggest(args, quantity, np.zeros(loaded.shape.n_layers), loaded)
    subject = runner.prepare_subject(
        loaded,
        args.text,
        tokens=args.tokens,
        sequence=args.sequence,
        column=args.column,
        seed=args.seed,
        layers=None if args.layers is None else _layers(args.layers),
        precision=args.precision,
    )
    with progress.bars() as advance:
        frame = runner.run_measures(subject, measures, output=args.output, progress=advance)
    facts = runner.describe(subject)
    written = None
    if args.output:
        from entasis.anatomy import report  # the charts need altair

        name = Path(args.model).resolve().name
        written = report.write(frame, loaded.shape, measures, facts, Path(args.output), name=name)
    suggestion, notes = "", list[str]()
    if args.suggest:
        importance = suggest.rank_importance(frame, quantity, loaded.shape.n_layers)
        suggestion, notes = _suggest(args, quantity, importance, loaded)
        if args.output:
            write_text(Path(args.output) / FILES[args.suggest], suggestion)
    if args.json:
        answer = {"path": args.model, **facts, "values": runner.to_records(frame)}
        if suggestion:
            answer |= {"suggestion": suggestion, "notes": notes}
        print(json.dumps(answer))
        return 0
    if suggestion:
        print(suggestion, end="")
        for note in notes:
            print(f"# {note}")
        return 0
    console, table = Console(), summary.make_table(frame)
    shown = summary.fit_width(table, console.width)
    title = f"{args.model}: {facts['tokens']:,} tokens of {facts['documents']} documents"
    if table.rows:
        console.print(shown.rich(title))
    else:
        print(title)
    print("\n".join(summary.describe_whole(frame)))
    print(summary.state_finding(frame, facts["documents"]))
    if left := len(table.columns) - len(shown.columns):
        print(
            f"{left} more columns in {'the report' if written else '--json, or a report with --output DIR'}"
        )
    if written:
        print(f"report: {written}")
    return 0


def _layers(text: str) -> list[int]:
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise UserError(f"--layers is {text!r}; it must be numbers such as 0,8,11") from None


def _check_suggestion(args: argparse.Namespace) -> None:
    """Refuses options that the suggestion does not know, or lacks. Raises `UserError`."""
    from entasis.data.sources import is_corpus

    for option in TAKES["profile"]:
        if getattr(args, option) is not None and option not in TAKES.get(args.suggest, ()):
            knows = " and ".join(name for name, options in TAKES.items() if option in options)
            raise UserError(f"--{option} belongs to --suggest {knows}")
    if args.suggest in ("profile", "plan") and not args.budget:
        what = "parameters, such as 180M" if args.suggest == "profile" else "tokens, such as 5M"
        raise UserError(f"--suggest {args.suggest} needs --budget: a number of {what}")
    if args.suggest and args.layers:
        raise UserError("--suggest needs the importance of every layer; leave out --layers")
    if args.suggest == "plan" and not is_corpus(args.text):
        raise UserError(
            f"--suggest plan: {args.text} is no corpus, and nothing else can be trained on; make one with "
            "`entasis data prepare`"
        )


def _suggest(
    args: argparse.Namespace, quantity: str, values: np.ndarray, loaded: Loaded
) -> tuple[str, list[str]]:
    """YAML for a recipe, or JSON for a training plan, and remarks on it. Raises `UserError`."""
    import yaml

    from entasis.anatomy import suggest
    from entasis.train.recipe import Data

    shape = loaded.shape
    if args.suggest == "importance":
        return suggest.write_importance(quantity, values), []
    notes = [f"follows {quantity}; a suggestion to be tried against equal layers in a study"]
    if args.suggest == "profile":
        spread = suggest.SPREAD if args.spread is None else args.spread
        wanted, solution = suggest.suggest_profile(
            shape, values, budget=args.budget, spread=spread, scale=args.scale or "ffn"
        )
        text = yaml.safe_dump({"shape": wanted}, sort_keys=False, width=110)
        widths, heads = (
            ", ".join(str(getattr(layer, name)) for layer in solution.shape.layers)
            for name in ("d_ff", "n_heads")
        )
        notes += [f"{solution.achieved:,} parameters; FFN widths {widths}; heads {heads}", *solution.notes]
    else:
        train, validation = Path(args.text), None
        if train.name == "validation" and (train.parent / "train").is_dir():
            train, validation = train.parent / "train", str(train)
        data = Data(
            train=str(train),
            validation=validation,
            sequence=min(1024, shape.context),
            document_masking=loaded.document_masking,
        )
        text = suggest.suggest_plan(shape, values, tokens=args.budget, data=data)
    return text, notes
