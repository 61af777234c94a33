"""Grow a trained model: more layers, or wider ones, from the weights it has.

examples:
  entasis grow runs/tiny grown/tiny --operator llama_pro --after uniform:2
  entasis grow imported/smollm2 grown/smollm2 --operator average --after 15..18 --text book.txt
  entasis grow imported/smollm2 grown/smollm2 --operator interpolate --after top:4 t=0.3 method=slerp
  entasis grow runs/tiny grown/crown --operator duplicate --after middle:2 --profile crown --dry-run
  entasis grow --list

Where: `--after 15..28`, a list `3,7,11`, `uniform:8`, `top:8`, `middle:8`; "after i" lies between layers i and i + 1. An
operator's other options are written key=value. The new folder is a model like any other, and says of every layer where
it came from (provenance.json).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entasis import progress
from entasis.cli import growth_diagnostics, overrides
from entasis.cli.numbers import amount, seed, whole
from entasis.errors import UserError
from entasis.files import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from entasis.grow.folder import Growth
    from entasis.grow.growth import Operator
    from entasis.grow.transitions import Init
    from entasis.shape.shapes import LayerShape, ModelShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a finished run or an imported model")
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", help="the folder to make; must not exist, or be empty"
    )
    parser.add_argument("--list", action="store_true", help="name all operators, with their rules")
    parser.add_argument("--operator", metavar="NAME", help="how new layers or units are made")
    parser.add_argument("--after", metavar="PLACES", help="where layers are inserted")
    parser.add_argument(
        "--to-shape",
        metavar="SPEC",
        help="then every layer's widths: a preset, a file or key=value,…, as in entasis shape",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="then the widths of this profile, at the new depth and with as many parameters",
    )
    parser.add_argument("--text", metavar="PATH", help="measure the loss before and after on this text")
    parser.add_argument(
        "--tokens",
        type=amount(1),
        help="of the text whole documents, at most so many tokens, such as 20k; a single one is cut there (all)",
    )
    parser.add_argument("--sequence", type=whole(1), help="tokens read at once (the context, at most 1024)")
    parser.add_argument("--column", help="the text's key in jsonl and parquet (text)")
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn (0)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    overrides.accept(parser, dashes=False)


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args.json)
    if args.model is None or (args.folder is None and not args.dry_run):
        raise UserError("name the model and the folder to make (entasis grow --help says more)")
    from entasis.grow.folder import check_new, grow_folder, plan_growth

    _check_text(args)
    operators = _operators(args)
    planned = plan_growth(args.model, operators)
    if args.folder is not None:
        check_new(args.folder)
    init = _init(args)
    if args.dry_run:
        return _tell(planned, args, None)
    with contextlib.ExitStack() as held:
        loss = _measuring(args, held) if args.text else None
        losses = {"before": loss(args.model, "before")} if loss else None
        with progress.bars("numbers") as advance:
            growing, fitting = (functools.partial(advance, what) for what in ("growing", "fitting"))
            done = grow_folder(
                args.model, args.folder, operators, init=init, progress=growing, fitting=fitting
            )
        for name, found in done.diagnostics.items():
            for line in found.get("warnings", ()):
                print(f"warning: {name}: {line}", file=sys.stderr)
        if loss and losses:
            losses["after"] = loss(args.folder, "after")
    return _tell(done, args, losses)


def _check_text(args: argparse.Namespace) -> None:
    """Raises `UserError` for options that would come to nothing."""
    if args.text and args.dry_run:
        raise UserError("--text measures a model that is made; leave out --dry-run")
    for name in ("tokens", "sequence", "column"):
        if getattr(args, name) is not None and not args.text:
            raise UserError(f"--{name} is of the text to measure the loss on; name one with --text")
    if args.text and not _tokenizer_of(args.model).is_file():
        raise UserError(f"{args.model}: has no tokenizer.json, so no text can be scored")


def _tokenizer_of(model: str) -> Path:
    from entasis.model.weights import home_of

    return home_of(Path(model)) / "tokenizer.json"


def _init(args: argparse.Namespace) -> Init:
    """As the model's own run draws initial values, or that of the model it was grown from; by the seed given."""
    from entasis.grow import provenance
    from entasis.grow.transitions import Init
    from entasis.model.weights import home_of
    from entasis.train.resolved_recipe import read_stored

    file = home_of(Path(args.model)) / "recipe.yaml"
    if not file.is_file():
        return provenance.read_init(args.model, args.seed)
    recipe = read_stored(file)
    return Init(
        args.seed, recipe.optimizer.parametrisation, recipe.optimizer.base_width, recipe.init == "nested"
    )


def _operators(args: argparse.Namespace) -> list[Operator]:
    """What is to be done, one after another. Raises `UserError`."""
    from entasis.cli.shape import read_pairs
    from entasis.grow.growth import read_operator
    from entasis.model.weights import read_shape

    shape = read_shape(args.model)
    options = read_pairs(args.set)
    if args.after is not None:
        if "after" in options:
            raise UserError("give --after or after=, not both")
        options["after"] = args.after
    if args.operator is None and (options or not (args.to_shape or args.profile)):
        raise UserError("name an --operator (entasis grow --list), a --to-shape or a --profile")
    operators = [read_operator(args.operator, options, f"grow: {args.operator}")] if args.operator else []
    for operator in operators:
        shape = operator.plan(shape).shape
    if args.to_shape and args.profile:
        raise UserError("give --to-shape or --profile, not both")
    if args.to_shape or args.profile:
        target = [layer.to_dict() for layer in _target(args, shape)]
        if len(target) != shape.n_layers:
            raise UserError(
                f"--to-shape has {len(target)} layers, and the model {shape.n_layers} by then; "
                "name the --operator and the places that make the depths equal"
            )
        operators.append(read_operator("reshape", {"target": target}, "grow: reshape"))
    return operators


def _target(args: argparse.Namespace, shape: ModelShape) -> tuple[LayerShape, ...]:
    """The layers that are wanted; what is not said of their model is as in this one. Raises `UserError`."""
    from entasis.shape import cost, specification

    if args.to_shape:
        wanted = _written(args.to_shape)
    else:
        wanted = {"profile": args.profile, "budget": cost.parameters(shape)}
    if "preset" in wanted:  # it has a value of its own for every field
        free = [key for key in _NOT_IN_LAYERS if key not in wanted]
        return _checked(specification.resolve(wanted).shape, shape, free)
    known: dict[str, Any] = {**shape.to_dict(), "layers": shape.n_layers}
    ratios = {layer.n_heads // layer.n_kv_heads for layer in shape.layers if layer.n_heads}
    says_ratio = wanted.keys() & {"q_per_kv", "n_kv_heads"} or isinstance(wanted.get("layers"), list)
    if len(ratios) == 1 and not says_ratio:
        known["q_per_kv"] = ratios.pop()
    return _checked(specification.resolve({**known, **wanted}).shape, shape)


_NOT_IN_LAYERS = ("vocabulary", "context")
"""What may differ in the shape of another model, as none of its layers' widths depends on it."""


def _written(spec: str) -> dict[str, Any]:
    """What a preset, a file, a folder or key=value,… says of a shape. Raises `UserError`."""
    from entasis.cli.shape import read_pairs, split_pairs
    from entasis.configuration import read_yaml
    from entasis.model.weights import SHAPE, read_shape

    path = Path(spec)
    if "=" in spec:
        return read_pairs(split_pairs(spec))
    if (path / SHAPE).is_file():
        # Files leave out an interface that is learned.
        source: Any = {"interface": {"kind": "learned"}, **read_shape(path).to_dict()}
    elif path.suffix in (".json", ".yaml", ".yml"):
        source = read_yaml(path, spec)
        if isinstance(source, dict) and isinstance(source.get("shape"), dict):
            source = source["shape"]
        if not isinstance(source, dict):
            raise UserError(f"{spec}: is no mapping; write profile: NAME, or layers: with a list of them")
    else:
        return {"preset": spec}
    if isinstance(source.get("layers"), list):
        return {key: value for key, value in source.items() if key not in _NOT_IN_LAYERS}
    return source


def _checked(target: ModelShape, shape: ModelShape, free: Sequence[str] = ()) -> tuple[LayerShape, ...]:
    """The layers of `target`. Raises `UserError` where more than they, and what is `free`, would have to change."""
    from entasis.shape import specification

    wanted, known = ({"interface": {"kind": "learned"}, **x.to_dict()} for x in (target, shape))
    differs = [
        f"{key} is {wanted[key]}, the model's {known[key]}"
        for key in specification.FIELDS
        if key not in ("layers", *free) and wanted[key] != known[key]
    ]
    if differs:
        raise UserError(
            f"--to-shape: {'; '.join(differs)}; only heads, KV heads and FFN widths of layers can be changed"
        )
    return target.layers


def _measuring(args: argparse.Namespace, held: contextlib.ExitStack) -> Callable[[str, str], dict[str, Any]]:
    """What tells bits per byte and nats per token of a model's folder on the text, which is read once."""
    from entasis.data.sources import COLUMN
    from entasis.data.tokenizer import load as load_tokenizer
    from entasis.evaluate.loading import load
    from entasis.evaluate.scoring import corpus_of, score

    tokenizer = load_tokenizer(_tokenizer_of(args.model))
    corpus = held.enter_context(corpus_of(args.text, tokenizer, column=args.column or COLUMN))

    def loss(folder: str, when: str) -> dict[str, Any]:
        with progress.bars("tokens") as advance:
            told = functools.partial(advance, f"loss {when}")
            # A checkpoint has no tokenizer beside it.
            loaded = dataclasses.replace(load(folder, device="auto"), tokenizer=tokenizer)
            found = score(loaded, corpus, sequence=args.sequence, tokens=args.tokens, progress=told)
        return {
            "bits_per_byte": found.bits_per_byte,
            "nats_per_token": found.nll_sum / found.tokens,
            "tokens": found.tokens,
        }

    return loss


def _tell(growth: Growth, args: argparse.Namespace, losses: dict[str, Any] | None) -> int:
    from entasis.grow.growth import name_of
    from entasis.shape import cost

    old, new = growth.shapes[0], growth.shape
    newest = sum(cost.layer_parameters(new, i) for i in growth.lineage.newest)
    answer: dict[str, Any] = {
        "model": args.model,
        "folder": None if args.dry_run else args.folder,
        "operators": [name_of(x) for x in growth.operators],
        "keeps_function": growth.keeps_function,
        "rounded": growth.rounded,
        "parameters": {"before": cost.parameters(old), "after": cost.parameters(new), "new_layers": newest},
        "flops_per_token": {
            when: cost.flops_per_token(shape, min(1024, shape.context), training=False)
            for when, shape in (("before", old), ("after", new))
        },
        "bytes": growth.bytes,
        "memory_bytes": {
            "growing": growth.memory,
            "training_all": 16 * cost.parameters(new),
            "training_new": 4 * cost.parameters(new) + 12 * newest,
        },
        "temporary_bytes": growth.temporary,
        "layers": [
            {**row, **layer.to_dict()}
            for row, layer in zip(growth.lineage.to_list(), new.layers, strict=True)
        ],
        "diagnostics": growth.diagnostics,
        "loss": losses,
    }
    print(json.dumps(answer)) if args.json else _print(answer)
    return 0


def _print(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table("layer", "from", "operator", "heads", "KV heads", "FFN", box=None)
    for i, row in enumerate(answer["layers"]):
        source = ", ".join(map(str, row["sources"])) or "drawn"
        new = " (new)" if row["new"] else ""
        table.add_row(
            str(i),
            source,
            f"{row['operator'] or ''}{new}",
            *(str(row[k]) for k in ("n_heads", "n_kv_heads", "d_ff")),
        )
    console.print(table)
    count, memory = answer["parameters"], answer["memory_bytes"]
    flops = answer["flops_per_token"]
    print(
        f"{count['before']:,} → {count['after']:,} parameters, {count['new_layers']:,} of them in new layers; "
        f"forward {flops['after'] / flops['before']:.3f} × per token"
    )
    print(
        f"weights {format_bytes(answer['bytes'])}; memory to grow about {format_bytes(memory['growing'])} (beside torch), to train without "
        f"activations {format_bytes(memory['training_all'])}"
        + (f", only new layers {format_bytes(memory['training_new'])}" if count["new_layers"] else "")
    )
    if answer["temporary_bytes"]:
        print(
            f"temporary files {format_bytes(answer['temporary_bytes'])}, in {tempfile.gettempdir()} (TMPDIR)"
        )
    for name, found in answer["diagnostics"].items():
        growth_diagnostics.show(name, found, console)
    if losses := answer["loss"]:
        before, after = losses["before"], losses["after"]
        print(
            f"loss on {before['tokens']:,} tokens: {before['nats_per_token']:.4f} → {after['nats_per_token']:.4f} nats per token, "
            f"{before['bits_per_byte']:.4f} → {after['bits_per_byte']:.4f} bits per byte"
        )
    elif answer["rounded"]:
        print(
            "the grown model computes nearly the same, as its factors are rounded to the dtype of its weights; "
            "--text FILE measures its loss before and after"
        )
    elif not answer["keeps_function"]:
        print("the grown model computes something else; --text FILE measures its loss before and after")
    if answer["folder"]:
        print(f"written: {answer['folder']}")


def _list(as_json: bool) -> int:
    from entasis.grow import operators  # noqa: F401  (registers them)
    from entasis.grow.growth import OPERATORS

    known: dict[str, dict[str, Any]] = {
        name: {
            "rule": " ".join((kind.__doc__ or "").split()),
            "keeps_function": kind.keeps_function,
            "options": {
                field: None if f.is_required() else f.get_default(call_default_factory=True)
                for field, f in kind.model_fields.items()
            },
        }
        for name, kind in sorted(OPERATORS.items())
    }
    if as_json:
        print(json.dumps(known))
        return 0
    for name, about in known.items():
        print(f"{name} ({', '.join(about['options'])}){', computes the same' * about['keeps_function']}")
        print(f"    {about['rule']}")
    return 0
