"""Design, solve, draw and compare model shapes.

examples:
  entasis shape crown-paper/crown-18 crown-paper/baseline-18
  entasis shape --profile crown --layers 18 --d-model 768 --budget 180M
  entasis shape profile=isotropic,layers=8,d_model=256 profile=crown,layers=8,d_model=256,budget=32M
  entasis shape profile=crown,layers=12,d_model=768,head_multipliers.mid=2.0 --json
  entasis shape crown-paper/crown-18 --isotropic parameters --svg columns.svg
  entasis shape constructive/9-layer-binary --trainable blocks[6:] --trainable final_norm --trainable head

A shape is a preset, a list key=value,key=value (keys as under `shape:` in a recipe), or a file: a recipe, a
shape.json, or a folder that holds one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from entasis.cli.numbers import whole
from entasis.configuration import load_yaml, parse
from entasis.errors import UserError
from entasis.files import write_text
from entasis.shape import cost, interfaces, presets, profiles, rounding, selectors, specification
from entasis.shape.interfaces import LEARNED
from entasis.shape.shapes import ModelShape
from entasis.shape.solve import MEASURES, Solution, isotropic_of_equal_cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shapes", nargs="*", metavar="NAME", help="preset, key=value,… or file")
    parser.add_argument(
        "--list", action="store_true", help="name all presets, profiles and rounding policies"
    )
    design = parser.add_argument_group("a shape of one's own")
    for key, explanation in (
        ("profile", specification.DESIGN["profile"]),
        ("layers", "number of layers; left out, it is found from the budget"),
        ("d-model", "width of the residual stream; left out, it is found from the budget"),
        ("head-dim", "width of a head (64)"),
        ("vocabulary", "rows of the embedding (50304)"),
        ("budget", "parameters, such as 180M; or KIND=NUMBER with KIND one of " + ", ".join(MEASURES)),
        ("rounding", specification.DESIGN["rounding"]),
        ("device", specification.DESIGN["device"]),
        ("q-per-kv", specification.DESIGN["q_per_kv"]),
        ("n-kv-heads", specification.DESIGN["n_kv_heads"]),
    ):
        design.add_argument(f"--{key}", help=explanation)
    design.add_argument("--tied", action="store_true", help="input and output embedding are one table")
    design.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key, as in a recipe's shape:",
    )
    parser.add_argument(
        "--isotropic",
        choices=list(MEASURES),
        help="beside each shape, the one of equal layers that costs the same",
    )
    parser.add_argument(
        "--sequence", type=whole(1), help="length at which FLOPs are counted (the budget's own, or 1024)"
    )
    parser.add_argument(
        "--attended",
        choices=["full", "causal"],
        help="attended length of FLOPs: the whole sequence, as flop_counter counts, or half of it (the budget's own, or full)",
    )
    parser.add_argument(
        "--trainable",
        action="append",
        metavar="SELECTOR",
        help="count what a stage trains: blocks[6:], head, final_norm, 'not embedding'; may be given again",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="what an interface that draws the tokens draws")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--svg", metavar="FILE", help="write the columns as a figure")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args.json)
    named = [
        (_label(read_pairs(split_pairs(name)), name) if "=" in name else name, read_shape(name))
        for name in args.shapes
    ]
    if own := _own(args):
        named.append((_label(own, "own"), specification.resolve(own)))
    if not named:
        raise UserError("name a shape (entasis shape --list shows the presets) or give --profile")
    # What is shown is counted as the budget was.
    budgets = [s.budget for _, s in named if s.budget and s.budget.kind == "flops_per_token"]
    args.sequence = args.sequence or (budgets[0].sequence if budgets else 1024)
    args.attended = args.attended or (budgets[0].attended if budgets else "full")
    if args.isotropic:
        named = [
            pair
            for name, solution in named
            for pair in (
                (name, solution),
                (
                    f"isotropic of equal {args.isotropic}",
                    isotropic_of_equal_cost(solution.shape, args.isotropic, args.sequence, args.attended),
                ),
            )
        ]
    shapes = [(name, solution.shape) for name, solution in named]
    if args.svg:
        from entasis.report.silhouettes import figure

        _write_new(Path(args.svg), figure(shapes))
    if args.json:
        answers = [_answer(name, solution, args) for name, solution in named]
        print(json.dumps(answers[0] if len(answers) == 1 else answers))
        return 0
    _print(named, args)
    return 0


def _print(named: list[tuple[str, Solution]], args: argparse.Namespace) -> None:
    from rich.console import Console

    from entasis.shape import draw

    # Piped into a file there is no terminal to ask; the table needs about this much.
    console = Console(width=None if os.isatty(1) else 160, highlight=False)
    shapes = [(name, solution.shape) for name, solution in named]
    console.print(draw.columns(shapes, console.width))
    console.print()
    console.print(draw.table(shapes, sequence=args.sequence, attended=args.attended))
    # Beside an interface of another kind a learned one is told of as well.
    told = any(shape.interface != LEARNED for _, shape in shapes)
    for name, solution in named:
        if solution.budget is not None:
            budget = f"{solution.budget.kind} {solution.budget.value:,}"
            if solution.budget.kind == "flops_per_token":
                budget += f" (T {solution.budget.sequence}, {solution.budget.attended})"
            console.print(f"{name}: budget {budget}, achieved {solution.achieved:,} ({solution.miss:+.3%})")
        for note in (*solution.notes, *_say_interface(solution.shape, args, told=told)):
            console.print(f"{name}: {note}")
    if args.svg:
        console.print(f"figure: {args.svg}")


def _say_interface(shape: ModelShape, args: argparse.Namespace, *, told: bool) -> list[str]:
    """What there is to say of an interface, if it is `told`, and of a stage's share of the parameters."""
    notes, learning = [], _learning(shape, args)
    if told or learning is not None:
        uses = cost.count_uses(shape, learning)
        notes.append(
            f"parameters: {uses.active:,} active, {uses.frozen:,} frozen, {uses.stored:,} stored together"
        )
    if learning is not None:
        flops = cost.stage_flops_per_token(shape, learning, args.sequence, attended=args.attended) / 1e6
        memory = cost.training_memory(shape, learning)
        total = (memory.weights + memory.gradients + memory.optimizer) / 2**20
        notes.append(f"the stage: {flops:,.2f} M train FLOPs/token, weights+grads+AdamW {total:,.1f} MiB")
    if shape.interface == LEARNED:
        if told:
            rank = min(shape.d_model, shape.vocabulary)
            notes.append(f"interface learned: rank at most {rank:,}; what tokens it tells apart is learned")
    else:
        kind, seen = interfaces.name_of(shape.interface), _insight(shape, args)
        if seen is None:
            notes.append(
                f"interface {kind}: rank and collisions depend on the tokenizer; give --tokenizer FILE"
            )
        else:
            after = (
                f"{seen.distinct_after_norm:,} after the first norm" if shape.norm_placement == "pre" else ""
            )
            notes.append(
                f"interface {kind}: rank {seen.rank:,}; {seen.distinct:,} of {shape.vocabulary:,} tokens distinct, "
                + (after or "and no norm in front of the first layer")
                + (f" ({seen.vanishing:,} vanish there)" if seen.vanishing else "")
            )
    return notes


def _learning(shape: ModelShape, args: argparse.Namespace) -> list[str] | None:
    return selectors.select(shape, args.trainable, where="--trainable") if args.trainable else None


def _insight(shape: ModelShape, args: argparse.Namespace) -> interfaces.Insight | None:
    """Rank and injectivity of the interface; a drawn one's where the tokenizer is given."""
    if isinstance(shape.interface, interfaces.Glyph) and args.tokenizer:
        from entasis.data import glyphs

        return glyphs.insight(shape.interface, shape, Path(args.tokenizer))
    return shape.interface.insight(shape)


def _answer(name: str, solution: Solution, args: argparse.Namespace) -> dict[str, Any]:
    shape, sequence, attended = solution.shape, args.sequence, args.attended
    learning = _learning(shape, args)
    memory = cost.training_memory(shape, learning)
    seen = _insight(shape, args)
    stage = {}
    if learning is not None:
        flops = cost.stage_flops_per_token(shape, learning, sequence, attended=attended)
        stage = {"stage_flops_per_token": flops}
    budget = solution.budget and {**dataclasses.asdict(solution.budget), "achieved": solution.achieved}
    return {
        "name": name,
        "budget": budget,
        "parameters": cost.parameters(shape),
        "parameters_by_use": dataclasses.asdict(cost.count_uses(shape, learning)),
        **stage,
        "interface": {
            "kind": interfaces.name_of(shape.interface),
            **(dataclasses.asdict(seen) if seen else {}),
        },
        "parameters_without_input_embedding": cost.parameters_without_input_embedding(shape),
        "flops_per_token": cost.flops_per_token(shape, sequence, attended=attended),
        "forward_flops_per_token": cost.flops_per_token(shape, sequence, training=False, attended=attended),
        "kv_bytes_per_token": cost.kv_bytes_per_token(shape),
        "memory_bytes": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
        },
        "sequence": sequence,
        "attended": attended,
        "miss": solution.miss,
        "notes": list(solution.notes),
        "layers": [
            {
                **layer.to_dict(),
                "parameters": cost.layer_parameters(shape, i),
                "flops_per_token": cost.layer_flops_per_token(shape, i, sequence, attended=attended),
            }
            for i, layer in enumerate(shape.layers)
        ],
        "shape": shape.to_dict(),
    }


def _list(as_json: bool) -> int:
    known: dict[str, Any] = {
        "presets": presets.names(),
        "profiles": {name: (rule.__doc__ or "").split("\n")[0] for name, rule in profiles.PROFILES.items()},
        "rounding": {name: (rule.__doc__ or "").split("\n")[0] for name, rule in rounding.POLICIES.items()},
        "controls": ["/reversed", "/shuffled:SEED"],
    }
    if as_json:
        print(json.dumps(known))
        return 0
    print("presets:   " + "\n           ".join(known["presets"]))
    for heading in ("profiles", "rounding"):
        print(f"{heading}:")
        for name, explanation in known[heading].items():
            print(f"  {name:12} {explanation}")
    print(
        f"controls:    {' and '.join(f'PROFILE{control}' for control in known['controls'])}, of any profile"
    )
    return 0


def _own(args: argparse.Namespace) -> dict[str, Any]:
    """The specification that the options spell out; empty without any. Raises `UserError` where they describe none."""
    pairs = []
    for key in (
        "profile",
        "layers",
        "d_model",
        "head_dim",
        "vocabulary",
        "rounding",
        "device",
        "q_per_kv",
        "n_kv_heads",
    ):
        if (value := getattr(args, key)) is not None:
            pairs.append(f"{key}={value}")
    if args.budget:
        kind, equals, _ = args.budget.partition("=")
        pairs.append(f"budget.{args.budget}" if equals and kind else f"budget={args.budget}")
        if kind == "flops_per_token" and equals:
            pairs += [
                f"budget.{key}={getattr(args, key)}" for key in ("sequence", "attended") if getattr(args, key)
            ]
    if args.tied:
        pairs.append("tied_embeddings=true")
    own = read_pairs([*pairs, *args.set])
    if own and not ("profile" in own or "preset" in own or isinstance(own.get("layers"), list)):
        raise UserError(
            f"{next(iter(own))}: options describe a shape of their own and need --profile; another's is set in its file, "
            "or beside its name, as in preset=NAME,KEY=VALUE"
        )
    return own


def read_shape(name: str) -> Solution:
    """A shape by preset, by key=value pairs, or from a file."""
    path = Path(name)
    if path.is_dir() and (path / "shape.json").is_file():
        path = path / "shape.json"
    if path.suffix in (".json", ".yaml", ".yml"):
        try:
            source = load_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
        is_recipe = isinstance(source, dict) and ("shape" in source or "start" in source)
        return _of_recipe(source, path) if is_recipe else specification.resolve(source)
    if "=" in name:
        return specification.resolve(read_pairs(split_pairs(name)))
    return Solution(specification.preset(name))


def _of_recipe(recipe: dict[str, Any], path: Path) -> Solution:
    """The shape that `entasis train` begins with. Raises `UserError`.

    Without a corpus to take the vocabulary from, it is assumed, and that is said.
    """
    from entasis.train import recipe as recipes
    from entasis.train.resolve import shape_of, with_mup_scales
    from entasis.train.stages import check_parametrisation

    wanted: Any = recipe.get("shape")
    if wanted is None and recipe.get("start") is not None:
        return Solution(shape_of(parse(recipes.Start, recipe["start"], f"{path}: start")))
    optimizer = parse(recipes.Optimizer, recipe.get("optimizer") or {}, f"{path}: optimizer")
    check_parametrisation(optimizer)
    solution = _drawn(recipe, wanted, path)
    return with_mup_scales(solution, wanted, optimizer) if optimizer.parametrisation == "mup" else solution


def _drawn(recipe: dict[str, Any], wanted: Any, path: Path) -> Solution:
    """The shape that a recipe's specification draws, with the vocabulary of its corpus. Raises `UserError`."""
    from entasis.data.corpus import Corpus
    from entasis.data.sources import is_corpus
    from entasis.train import recipe as recipes

    if not isinstance(wanted, dict) or wanted.keys() & {"vocabulary", "preset"}:
        return specification.resolve(wanted)
    assumed = f"the vocabulary is assumed to be {specification.DEFAULT_VOCABULARY:,} rows: {path} names none"
    if recipe.get("data") is not None:
        text = recipes.mixture_of(parse(recipes.Data, recipe["data"], f"{path}: data").train)
        corpus = next(iter(text.values())).path
        if is_corpus(corpus):
            return specification.resolve({**wanted, "vocabulary": Corpus(corpus).vocabulary})
        assumed += f", and its data.train, {corpus}, is not prepared here"
    try:
        solution = specification.resolve({**wanted, "vocabulary": specification.DEFAULT_VOCABULARY})
    except UserError as error:
        raise UserError(f"{error}; {assumed}") from error
    return dataclasses.replace(solution, notes=(*solution.notes, assumed))


def _label(wanted: dict[str, Any], otherwise: str) -> str:
    """The profile of a specification, which would itself be too long, where it has one."""
    profile = wanted.get("profile", otherwise)
    return (
        ", ".join(f"{part} {name}" for part, name in profile.items())
        if isinstance(profile, dict)
        else str(profile)
    )


def split_pairs(text: str) -> list[str]:
    """Pairs between commas; a comma inside brackets belongs to the value."""
    pairs, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            pairs.append(text[start:i])
            start = i + 1
    return [*pairs, text[start:]]


def read_pairs(pairs: list[str]) -> dict[str, Any]:
    """`a=1`, `b.c=2` as a nested mapping; values are YAML."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{pair!r}: write key=value")
        *path, last = key.strip().replace("-", "_").split(".")
        target = result
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"{pair!r}: {part} already has a value")
        target[last] = load_yaml(value, repr(pair))
    return result


def _write_new(path: Path, text: str) -> None:
    if path.exists():
        raise UserError(f"{path} exists; name another file")
    write_text(path, text)
