"""What each growth operator does to the loss of a trained model, at the same positions, before anything is trained.

    python benchmarks/growth_losses.py imported/smollm2 prose --count 10 --folder lab       # half an hour for 135 M parameters
    python benchmarks/growth_losses.py runs/tiny prose --count 2 --tokens 2k --only average,llama_pro,duplicate

Every operator that takes positions is asked at `uniform:COUNT` and `top:COUNT`; those that have positions of their own stand
beside `duplicate` at these. The text is scored as `entasis evaluate` does it. Grown models are removed again; what an operator
cannot do with this model is told in its row. Rows lie in FOLDER/rows until all are there: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import write

from entasis.cli.numbers import amount
from entasis.errors import UserError
from entasis.evaluate.loading import load
from entasis.evaluate.scoring import corpus_of, score
from entasis.grow import operators  # noqa: F401  (registers them)
from entasis.grow.folder import grow_folder
from entasis.grow.growth import OPERATORS, read_operator
from entasis.model.weights import read_shape


def main() -> None:
    """Grows, scores, removes, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--count", type=int, required=True, help="new layers")
    parser.add_argument("--tokens", type=amount(2), default=20_000)
    parser.add_argument("--only", help="some operators, by name")
    parser.add_argument(
        "--folder", type=Path, default=Path("growth-losses"), help="where models and rows lie"
    )
    args = parser.parse_args()
    shape = read_shape(args.model)
    kept = args.folder / "rows"
    kept.mkdir(parents=True, exist_ok=True)
    names = args.only.split(",") if args.only else None
    asked = [a for a in _asked(shape.n_layers, args.count) if names is None or a[1] in names]
    rows = {}
    for number, (label, name, options) in enumerate([("before", "", {}), *asked]):
        file = kept / f"{label}.json"
        if not file.exists():
            row = _row(args, name, options)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(row), encoding="utf-8")
            partial.rename(file)
        rows[label] = json.loads(file.read_text(encoding="utf-8"))
        told = rows[label].get("nats_per_token", rows[label].get("refused"))
        print(f"{number} of {len(asked)}: {label}: {told}", flush=True)
    write(
        "growth-losses",
        ["torch", "numpy", "safetensors"],
        layers={"before": shape.n_layers, "after": shape.n_layers + args.count},
        threads=torch.get_num_threads(),
        rows=rows,
    )


def _asked(layers: int, count: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, operator, options), all of which add `count` layers."""
    for name, kind in sorted(OPERATORS.items()):
        fields = kind.model_fields
        if "after" in fields:
            yield from (
                (f"{name}-{places}", name, {"after": f"{places}:{count}"}) for places in ("uniform", "top")
            )
    for places in ("uniform", "top"):
        after = {"after": f"{places}:{count}"}
        # What matching alone yields: the control that the gain over `average` is held against.
        yield f"aligned_average-control-{places}", "aligned_average", {**after, "control": True}
        yield f"interpolate-slerp-{places}", "interpolate", {**after, "method": "slerp"}
        # The paper's own ablations: raw weights for the shared basis, no norm loss; and that loss by rows.
        yield f"lesa-raw-{places}", "lesa", {**after, "basis": "none"}
        yield f"lesa-without-norm-{places}", "lesa", {**after, "norm_loss": "none"}
        yield f"lesa-norm-by-rows-{places}", "lesa", {**after, "norm_loss": "row"}
    drop, middle = (layers - count) // 2, (-(-layers // count // 2) - 1) * count
    yield "solar", "solar", {"drop": drop}
    yield "solar-twin", "duplicate", {"after": list(range(drop, layers - drop))}
    yield "append_last", "append_last", {"count": count}
    yield "append_last-twin", "duplicate", {"after": list(range(layers - count, layers))}
    yield "append_middle", "append_middle", {"count": count}
    yield "append_middle-twin", "duplicate", {"after": list(range(middle, middle + count))}
    yield "append_random", "append_random", {"count": count}


def _row(args: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The loss of the model grown so, or of the model itself, and how long each part took."""
    row: dict[str, Any] = {"options": options}
    folder, began = Path(args.model), time.perf_counter()
    if name:
        folder = args.folder / "grown"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            grown = grow_folder(args.model, folder, [read_operator(name, options, f"grow: {name}")])
        except UserError as error:
            return {**row, "refused": str(error)}
        row |= {"diagnostics": grown.diagnostics, "growing_seconds": round(time.perf_counter() - began, 1)}
    began = time.perf_counter()
    loaded = load(folder)
    assert loaded.tokenizer is not None, "a model without a tokenizer scores no text"
    with corpus_of(args.text, loaded.tokenizer) as corpus:
        found = score(loaded, corpus, tokens=args.tokens)
    return row | {
        "nats_per_token": found.nll_sum / found.tokens,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "scoring_seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    main()
