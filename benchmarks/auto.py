"""Whether `auto` picks the fastest settings: what it chooses, beside the training loop's speed in every candidate.

    python benchmarks/auto.py --shape quickstart
    python benchmarks/auto.py --shape peers

Every candidate (precision × attention × compiled or not) trains by the loop behind `entasis train`, all in turn, forwards
and backwards; a round takes the median of its steps after the first five, the figures are those of the fastest round, as
other work on the machine only slows. Then `auto` is asked several times, and the speed of what it chose is divided by that
of the fastest it could have chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write

from entasis.train import auto_settings
from entasis.train import recipe as recipes
from entasis.train.candidates import Settings
from entasis.train.resolve import resolve
from entasis.train.run import train

CACHE = Path(__file__).parents[1] / ".cache/auto"
WARM_UP = 5
LONG = 10**9
"""Tokens of a run in which the choice has all the time it wants."""


class Enough(Exception):
    """Ends a measured run."""


def main() -> None:
    """Writes and prints benchmarks/results/auto-TIME.json."""
    args = arguments()
    recipe = recipe_of(args.shape, args.tokens)
    candidates = [
        Settings(p, a, c)  # type: ignore[arg-type]
        for p, a, c in itertools.product(("fp32", "bf16"), ("sdpa", "plain"), args.compile)
    ]
    if args.prepare_only:
        return
    rounds: dict[Settings, list[float]] = {s: [] for s in candidates}
    for i in range(args.rounds):
        for settings in candidates if i % 2 == 0 else reversed(candidates):
            rounds[settings].append(speed(recipe, settings, args.steps))
            print(f"round {i + 1}: {settings} {rounds[settings][-1]:,.0f} tokens/s", flush=True)
    speeds = {s: max(values) for s, values in rounds.items()}
    best = max(speeds, key=lambda s: speeds[s])
    choices = [ask(recipe, args.compile) for _ in range(args.asked)]
    write(
        "auto",
        ["torch"],
        shape=args.shape,
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        tokens_per_second={str(s): v for s, v in speeds.items()},
        rounds={str(s): v for s, v in rounds.items()},
        fastest=str(best),
        choices=[
            {"chosen": str(s), "share_of_fastest": speeds[s] / speeds[best], **auto} for s, auto in choices
        ],
    )


def ask(recipe: recipes.Recipe, compile: list[bool]) -> tuple[Settings, dict[str, Any]]:
    """What `auto` chooses of a recipe, and its record; with one way of compiling only, that is given."""
    open_ = recipe.replaced(
        precision="auto", attention="auto", compile=compile[0] if len(compile) == 1 else "auto"
    )
    resolved, shape, _ = resolve(open_, recipe.shape["vocabulary"])
    chosen, auto = auto_settings.choose(resolved, shape, torch.device("cpu"))
    assert auto is not None
    return auto_settings.settings_of(chosen), auto


def speed(recipe: recipes.Recipe, settings: Settings, steps: int) -> float:
    """Tokens per second of the training loop."""
    seconds: list[float] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seconds.append(event["seconds"])
            if len(seconds) == WARM_UP + steps:
                raise Enough

    given = recipe.replaced(**settings._asdict())
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        train(given, Path(folder) / "run", reporter=listen)
    return recipe.batch.tokens / statistics.median(seconds[WARM_UP:])


def recipe_of(name: str, tokens: int) -> recipes.Recipe:
    """The quickstart's baseline, or the small shape of `peers/run.py`."""
    if name == "quickstart":
        from entasis.study import plan, study_files

        plain = plan.solve(study_files.read("quickstart"))["isotropic"].recipe
    else:
        layer = {"n_heads": 6, "n_kv_heads": 6, "d_ff": 512}
        plain = {
            "shape": {"d_model": 192, "head_dim": 32, "vocabulary": 8192, "context": 256,
                      "tied_embeddings": True, "layers": [layer] * 6},
            "data": {"sequence": 256},
            "batch": {"tokens": 2048},
        }  # fmt: skip
    corpus = CACHE / name
    if not corpus.exists():
        from entasis.data.prepare import prepare

        size = plain["shape"]["vocabulary"]
        prepare(["stdlib"], corpus, tokenizer=None, train_tokenizer=size, validation=0.05)
    plain["data"] = {"train": str(corpus / "train"), "sequence": plain["data"]["sequence"]}
    changes = {"tokens": tokens, "checkpoint": {"every": None}, "logging": {"tensorboard": False}}
    return recipes.from_dict({**plain, **changes, "device": "cpu"})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("quickstart", "peers"), default="quickstart")
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--tokens", type=int, default=LONG, help="length of the run that is asked about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed in each round, after five to warm up")
    parser.add_argument("--asked", type=int, default=3, help="how often auto is asked")
    parser.add_argument("--prepare-only", action="store_true", help="only make the corpus")
    args = parser.parse_args()
    args.compile = {"no": [False], "yes": [True], "both": [False, True]}[args.compile]
    return args


if __name__ == "__main__":
    main()
