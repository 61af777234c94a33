"""A model's folder → a grown model's folder, one tensor in memory at a time.

    grow_folder("imported/smollm2", "grown/smollm2-34", [read_operator("average", {"after": "uniform:4"}, "grow")])

Several operators are carried out one after another; what lies between them is written into the new folder while it is made,
and removed.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from entasis import __version__, files
from entasis.errors import Failure, UserError
from entasis.grow import growth, provenance, resize
from entasis.grow.growth import Operator
from entasis.grow.provenance import Lineage
from entasis.grow.resize import ResizePlan
from entasis.grow.transitions import Init
from entasis.model import weights, weights_writer
from entasis.model.weights import StoredWeights
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

BESIDE = (weights.TOKENIZER, "tokenizer_config.json", "generation_config.json")
"""What comes along from the old model's folder."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Growth:
    """What is done, or would be: the shapes on the way and where each layer of the last one comes from."""

    shapes: tuple[ModelShape, ...]
    """The old model's, and the one after each operator."""
    operators: tuple[Operator, ...]
    lineage: Lineage
    bytes: int
    """Of the written weights."""
    on_disk: int
    """The most bytes of weights that lie in the new folder at once: those of one operator's model beside the next one's."""
    memory: int
    """About the most bytes of tensors held at once: one, its sources and their sum, or what an operator fits."""
    temporary: int
    """The most bytes of temporary files at once."""
    rounded: bool
    """Whether it would compute what the old model did, but for factors that the dtype of the weights rounds."""
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        return self.shapes[-1]

    @property
    def keeps_function(self) -> bool:
        """Whether the grown model computes what the old one did."""
        return _compute_the_same(self.operators, self.shapes) and not self.rounded


def plan_growth(source: str | Path, operators: Sequence[Operator]) -> Growth:
    """What growing the model in `source` would do; nothing is written. Raises `UserError`."""
    stored = StoredWeights(source)
    shapes, before = [stored.shape], provenance.read(source, stored.shape.n_layers)
    lineage, plans = before, []
    for number, operator in enumerate(operators):
        plan = operator.plan(shapes[-1])
        lineage = _joined(lineage, lineage.after(plan)) if number else lineage.after(plan)
        shapes.append(plan.shape)
        plans.append(plan)
    # What all the operators added is new.
    if fresh := frozenset(lineage.ids) - frozenset(before.ids):
        lineage = replace(lineage, added=fresh)
    width = stored.dtypes["norm.weight"].itemsize
    sizes = [[width * math.prod(size) for size in layout.sizes(shape).values()] for shape in shapes]
    written = [0, *map(sum, sizes[1:])]
    fits = [operator.memory(shape) for operator, shape in zip(operators, shapes, strict=False)]
    filed = [operator.temporary(shape) for operator, shape in zip(operators, shapes, strict=False)]
    narrow = any(dtype.itemsize < 4 for dtype in stored.dtypes.values())
    return Growth(
        shapes=tuple(shapes),
        operators=tuple(operators),
        lineage=lineage,
        bytes=written[-1],
        on_disk=max(a + b for a, b in itertools.pairwise(written)),
        memory=max(4 * max(map(max, sizes[1:])), *fits),
        temporary=max(filed, default=0),
        rounded=narrow and _compute_the_same(operators, shapes) and any(map(resize.rounds, plans)),
    )


def _compute_the_same(operators: Sequence[Operator], shapes: Sequence[ModelShape]) -> bool:
    """Whether, in exact numbers, the model of the last shape computes what that of the first does."""
    return all(operator.computes_the_same(shape) for operator, shape in zip(operators, shapes, strict=False))


def grow_folder(
    source: str | Path,
    folder: str | Path,
    operators: Sequence[Operator],
    *,
    init: Init | None = None,
    progress: Progress | None = None,
    fitting: Progress | None = None,
) -> Growth:
    """Writes the grown model into the new folder `folder`; the tokenizer comes along.

    `init` says how initial values are drawn where an operator needs some. `progress` gets the numbers written and the
    numbers there are, `fitting` how far an operator is that fits something first. Raises `UserError` for what cannot be grown so, for
    damaged weights and for a `folder` that is not empty; `DiskFull` where there is no room. Nothing is then left behind.
    """
    source, folder, init = Path(source), Path(folder), init or Init()
    planned = plan_growth(source, operators)
    check_new(folder)
    StoredWeights(source).verify()
    with files.new_folder(folder, need=planned.on_disk) as aside:
        _refuse_too_small(folder, aside, planned)
        diagnostics: dict[str, Any] = {}
        before = source
        for number, operator in enumerate(operators):
            if fitting:
                operator.tell(fitting)
            last = number == len(operators) - 1
            target = aside if last else aside / f"step-{number}"
            target.mkdir(exist_ok=True)
            _apply(before, target, operator, init, weights.home_of(source), progress)
            if operator.diagnostics:
                diagnostics[growth.name_of(operator)] = operator.diagnostics
            if before != source:
                shutil.rmtree(before)
            before = target
        record = _record(source, planned, init, diagnostics)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (aside / provenance.PROVENANCE).write_text(text, encoding="utf-8")
    return Growth(**{**vars(planned), "diagnostics": diagnostics})


def check_new(folder: str | Path) -> None:
    """Raises `UserError` where a model cannot be written because something is there already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder")


def _apply(
    before: Path, target: Path, operator: Operator, init: Init, home: Path, progress: Progress | None
) -> None:
    """Writes the model that one operator makes of another: weights, shape and tokenizer."""
    stored = StoredWeights(before)
    plan = operator.settle(operator.plan(stored.shape), stored.read, stored.shape)
    described = _describe(stored, plan)
    text = json.dumps(plan.shape.to_dict(), indent=1) + "\n"
    (target / weights.SHAPE).write_text(text, encoding="utf-8")
    for name in BESIDE:
        if (home / name).is_file():
            shutil.copyfile(home / name, target / name)
    total = sum(torch.Size(size).numel() for _, size in described.values())
    tensors = _watched(operator.weights(plan, stored.read, init), growth.name_of(operator), total, progress)
    weights_writer.write(target / weights.WEIGHTS, described, tensors, weights.hashes_beside(target))


def _describe(stored: StoredWeights, plan: ResizePlan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name → dtype and size of what is written: a moved parameter keeps its dtype, a made one has that of the norms."""
    common = stored.dtypes["norm.weight"]
    return {
        name: (stored.dtypes[entry.sources[0][0]] if entry.is_moved else common, entry.size)
        for name, entry in plan.parameters.items()
    }


def _watched(
    tensors: Iterator[tuple[str, torch.Tensor]], operator: str, total: int, progress: Progress | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they come. Raises `Failure` for numbers that are not finite."""
    done = 0
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise Failure(f"grow: {operator}: {name} came out with numbers that are not finite")
        yield name, tensor
        done += tensor.numel()
        del tensor  # else it would be held while the next is made
        if progress:
            progress(done, total)


def _refuse_too_small(folder: Path, aside: Path, planned: Growth) -> None:
    """Raises `DiskFull` before the work where the room does not suffice, for the model or for temporary files."""
    need = planned.on_disk
    if planned.temporary:
        files.check_temporary(planned.temporary)
        if files.on_temporary_disk(aside):
            need += planned.temporary
    if shutil.disk_usage(aside).free < need:
        raise files.no_space(folder, OSError(), need=need)


def _joined(first: Lineage, then: Lineage) -> Lineage:
    """The lineage over two operators: sources are the first model's."""
    origins = []
    for origin in then.origins:
        through = [first.origins[i] for i in origin.sources]
        names = dict.fromkeys(x for x in (*(o.operator for o in through), origin.operator) if x)
        origins.append(
            replace(
                origin,
                sources=tuple(dict.fromkeys(s for o in through for s in o.sources)),
                operator=" + ".join(names) or None,
            )
        )
    return replace(then, origins=tuple(origins))


def _record(source: Path, planned: Growth, init: Init, diagnostics: dict[str, Any]) -> dict[str, Any]:
    """What `provenance.json` holds."""
    earlier, rows = source / provenance.PROVENANCE, provenance.read_rows(source)
    drawn = asdict(init)
    return {
        "grown_by": f"entasis {__version__}",
        "operators": [
            {"operator": growth.name_of(x), **x.model_dump(exclude_defaults=True)} for x in planned.operators
        ],
        "seed": drawn.pop("seed"),
        "init": drawn,
        "from": {
            "folder": str(source),
            "weights": weights.fingerprint(source),
            "layers": planned.shapes[0].n_layers,
            "provenance": files.read_json(earlier) if earlier.is_file() else rows and {"layers": rows},
        },
        "layers": planned.lineage.to_list(),
        **({"diagnostics": diagnostics} if diagnostics else {}),
    }
