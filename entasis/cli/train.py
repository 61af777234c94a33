"""Train a model from a recipe.

example:
  entasis data prepare stdlib --train-tokenizer 4096 --output corpora/stdlib
  entasis train tiny --output runs/tiny
  entasis train tiny optimizer.lr=1e-3 shape.profile=crown --output runs/crown
  torchrun --nproc-per-node 2 -m entasis train tiny --output runs/tiny

Any part of the recipe can be set with key=value (or --key=value); lists by number, as in stages.0.tokens=2M.
The same command goes on from the last whole checkpoint, or answers from a finished run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from entasis.cli import overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a YAML file (docs/training.md lists its keys), or the name of a shipped recipe: tiny"
    )
    parser.add_argument("--output", metavar="FOLDER", help="the run's folder (default: runs/NAME-OF-RECIPE)")
    parser.add_argument(
        "--print-config",
        "--print_config",
        action="store_true",
        help="show the fully resolved recipe and stop",
    )
    parser.add_argument(
        "--live", action="store_true", help="on a terminal: a table of the run instead of a bar"
    )
    parser.add_argument("--json", action="store_true", help="print result.json")
    overrides.accept(parser)


def run(args: argparse.Namespace) -> int:
    from entasis.train import recipe as recipes

    recipe = recipes.read(args.recipe, args.set)
    if args.print_config:
        from entasis.train import auto_settings, preflight
        from entasis.train import device as devices

        resolved, shape, _, _ = preflight.resolve_with_data(recipe)
        device = devices.choose_device(recipe.device)
        preflight.check_settings(resolved, device)
        print(recipes.to_yaml(auto_settings.choose(resolved, shape, device)[0]), end="")
        return 0
    from entasis.train import parallel
    from entasis.train.display import Display
    from entasis.train.run import train

    folder = Path(args.output or Path("runs") / Path(args.recipe).stem)
    with Display(folder, live=args.live) as display:
        result = train(recipe, folder, reporter=display)
    # Only rank 0 speaks; the process group is gone by now, its environment is not.
    if not parallel.is_main_process():
        return 0
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(_summary(result, folder))
    return 0


def _summary(result: dict[str, Any], folder: Path) -> str:
    lines = [
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, {result['steps']} steps, "
        f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.1%} of the measured ceiling"
        + (" (measured while other work took the processor: too high)" if result.get("busy") else ""),
        f"training loss {result['loss']:.4f} nats per token",
    ]
    if result["validation"]:
        lines.append(f"validation {result['validation']['bits_per_byte']:.4f} bits per byte")
    return "\n".join([*lines, f"in {folder}"])
