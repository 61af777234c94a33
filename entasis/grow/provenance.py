"""Where each layer of a model came from: a list that goes along with weights, through stages, runs and folders.

Of every layer it says its `id` (kept for life; a new layer gets the next that is free), its `sources` (layers of the model
before the last transition; none for a drawn one), the `operator` that made it then (null: only moved), whether it is `new`
(added by the last transition that added any), whether it is `frozen`, and its `history`: every operator that made or
changed it, with the ids of what that took it from. It stands in `result.json` of a run, in the state of a checkpoint, and in `provenance.json` of a
grown model; there, under `init`, also how initial values are drawn. Needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entasis import files
from entasis.errors import Damaged
from entasis.grow.resize import Origin, ResizePlan
from entasis.grow.transitions import Init

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Making:
    """One time that a layer was made or changed."""

    operator: str
    sources: tuple[int, ...]
    """Ids of the layers it was taken from."""


@dataclass(frozen=True)
class Lineage:
    """Of every layer its id, and what it was made of."""

    ids: tuple[int, ...]
    origins: tuple[Origin, ...]
    """In the last transition."""
    histories: tuple[tuple[Making, ...], ...]
    added: frozenset[int] = frozenset()
    """Ids of the layers that the last transition added which added any."""

    @property
    def newest(self) -> tuple[int, ...]:
        """Positions of the layers that were added last."""
        return tuple(i for i, layer_id in enumerate(self.ids) if layer_id in self.added)

    def after(self, plan: ResizePlan) -> Lineage:
        """The lineage of the model that a transition makes of this one."""
        fresh = itertools.count(max(self.ids) + 1)
        ids = tuple(next(fresh) if x.is_new else self.ids[x.sources[0]] for x in plan.layers)
        histories = []
        for x in plan.layers:
            before = () if x.is_new else self.histories[x.sources[0]]
            made = (Making(x.operator, tuple(self.ids[i] for i in x.sources)),) if x.operator else ()
            histories.append(before + made)
        added = frozenset(i for i, x in zip(ids, plan.layers, strict=True) if x.is_new)
        return Lineage(ids, plan.layers, tuple(histories), added or self.added)

    def to_list(self, frozen: Collection[int] = ()) -> list[dict[str, Any]]:
        """For JSON; `frozen` are the positions of the layers that do not learn."""
        return [
            {
                "id": layer_id,
                "sources": list(origin.sources),
                "operator": origin.operator,
                "new": layer_id in self.added,
                "frozen": i in frozen,
                "history": [{"operator": made.operator, "from": list(made.sources)} for made in history],
            }
            for i, (layer_id, origin, history) in enumerate(
                zip(self.ids, self.origins, self.histories, strict=True)
            )
        ]


def begin(n_layers: int) -> Lineage:
    """Of a model without a past."""
    return Lineage(tuple(range(n_layers)), tuple(Origin((i,)) for i in range(n_layers)), ((),) * n_layers)


def read(folder: str | Path, n_layers: int) -> Lineage:
    """The lineage of the model in a folder: a run, a kept checkpoint, a grown or an imported model.

    A folder that says nothing has no past. Raises `Damaged`.
    """
    rows = read_rows(folder)
    return begin(n_layers) if rows is None else parse(rows, n_layers, folder)


def parse(rows: Any, n_layers: int, folder: str | Path) -> Lineage:
    """The lineage that the record of the layers in a folder tells. Raises `Damaged` where it tells none of so many layers."""
    try:
        # Earlier versions had one source.
        sources = [
            row["sources"] if "sources" in row else [row["source"]] * (row["source"] is not None)
            for row in rows
        ]
        origins = (
            Origin(tuple(map(int, found)), row["operator"] and str(row["operator"]), bool(row["new"]))
            for found, row in zip(sources, rows, strict=True)
        )
        histories = (
            tuple(
                Making(str(made["operator"]), tuple(map(int, made["from"])))
                for made in row.get("history", ())
            )
            for row in rows
        )
        ids = tuple(int(row["id"]) for row in rows)
        added = frozenset(i for i, row in zip(ids, rows, strict=True) if row["new"])
        found = Lineage(ids, tuple(origins), tuple(histories), added)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Damaged(f"damaged: the record of the layers in {folder} cannot be read ({error})") from error
    if len(found.ids) != n_layers or len(set(found.ids)) != n_layers:
        raise Damaged(f"damaged: {folder} has {n_layers} layers, and a record of {len(found.ids)}")
    return found


def read_rows(folder: str | Path) -> Any:
    """The record of the layers in a folder as it stands, None where there is none. Raises `Damaged`."""
    folder = Path(folder)
    for name, path in (("result.json", ()), (PROVENANCE, ()), ("state.json", ("provenance",))):
        if (folder / name).is_file():
            content: Any = files.read_json(folder / name)
            for key in path:
                content = content.get(key, {})
            if content.get("layers") is not None:
                return content["layers"]
    return None


def read_init(folder: str | Path, seed: int) -> Init:
    """How initial values were drawn when the model in a folder was grown, now by `seed`. Raises `Damaged`.

    A folder that does not say it (earlier versions, imported models) gives the standard ones.
    """
    path = Path(folder) / PROVENANCE
    told = files.read_json(path).get("init", {}) if path.is_file() else {}
    try:
        return Init(seed, **told)
    except TypeError as error:
        raise Damaged(f"damaged: {path} does not tell how initial values are drawn ({error})") from error
