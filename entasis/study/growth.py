"""Whether a study may run in a folder: it holds the same study, one that grows to this one, or another.

More seeds and further arms may be added at any time: the runs that are missing are added, and nothing else. Seeds that
are added once runs are finished depend on what was seen, so the study is judged by the anytime-valid t from then on, and
no p of a fixed number of seeds is claimed any more. What was planned first stays in `study.first.yaml`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.files import write_text
from entasis.study.config import Study
from entasis.study.stopping import Until
from entasis.study.study_files import read

FILE = "study.yaml"
FIRST = "study.first.yaml"
"""Beside `study.yaml` once a study has grown: as it was planned before its first run was finished."""


def stored(folder: Path) -> Study:
    """The study that a folder holds. Raises `UserError`."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: holds no study ({folder / FILE} is missing)")
    return read(folder / FILE)


def first(folder: Path) -> Study | None:
    """The study as it was first planned, where it has grown since."""
    return read(folder / FIRST) if (folder / FIRST).is_file() else None


def intended(study: Study, folder: Path) -> tuple[Study, list[str]]:
    """The study that will run in this folder, and what that changes, one line each; nothing is written.

    Raises `UserError` for a folder that holds another study, naming what differs with both values.
    """
    if not (folder / FILE).is_file():
        if folder.is_dir() and any(p.name != ".lock" for p in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no study; choose another --output")
        return study, []
    there, before = stored(folder), first(folder)
    if before is not None and study == before:
        return there, ["this study has grown since it was planned; it is taken as it is now"]
    _same_but_for_growth(there, study, folder)
    if not any(folder.glob("runs/*/*/result.json")):
        return study, [] if study == there else ["planned anew: no run is finished yet"]
    notes = []
    if added := [name for name in study.arms if name not in there.arms]:
        if "time" in study.protocols:
            raise UserError(
                f"{folder}: arm {added[0]} cannot be added under the protocol time, as the speeds of all arms are measured "
                "in turn before the first run; choose another --output"
            )
        notes.append(f"new: {', '.join(added)}")
    until, switched = _until(there, study, folder)
    if more := study.seeds[len(there.seeds) :]:
        notes.append(f"further seeds: {', '.join(map(str, more))}")
    # Seeds that are there stay in it, whatever the most is now.
    seeds = max(there.seeds, study.seeds, key=len)
    if switched:
        notes.append(switched)
    return study.replaced(until=until, seeds=seeds), notes


def begin(study: Study, folder: Path) -> tuple[Study, list[str]]:
    """As `intended`, and writes `study.yaml`, and `study.first.yaml` where the study grows after its first runs."""
    wanted, notes = intended(study, folder)
    there = stored(folder) if (folder / FILE).is_file() else None
    started = any(folder.glob("runs/*/*/result.json"))
    grown = there is not None and wanted.replaced(downstream=there.downstream) != there
    if there is not None and grown and started and not (folder / FIRST).is_file():
        write_text(folder / FIRST, there.to_yaml())
    if wanted != there:
        write_text(folder / FILE, wanted.to_yaml())
    return wanted, notes


def _until(there: Study, here: Study, folder: Path) -> tuple[Until | None, str | None]:
    """When the grown study ends, and a line where it is judged otherwise than it was planned. Raises `UserError`."""
    old, new = there.until, here.until
    if old is None:
        if new is None and here.seeds == there.seeds:
            return None, None
        new = new or Until(seeds=len(here.seeds))
        if new.method != "anytime" or new.g != Until().g or new.looks:
            raise UserError(
                f"{folder} holds finished runs of {len(there.seeds)} fixed seeds; looks and until.g are planned before the "
                "first run: leave out all but detectable and seeds, or choose another --output"
            )
        return new, (
            f"planned with {len(there.seeds)} seeds and judged by the anytime-valid t from now on: no p of a fixed number "
            "of seeds is claimed"
        )
    new = new or dataclasses.replace(old, seeds=max(old.seeds, len(here.seeds)))
    if new.method == "anytime" and old.method == "looks":
        if new.g != Until().g:
            raise UserError(f"{folder}: until.g is planned before the first run; leave it out")
        return (
            new,
            "planned with looks and judged by the anytime-valid t from now on: no p of the looks is claimed",
        )
    planned = ("method", "g", "looks", "spending", *(["seeds"] if old.method == "looks" else []))
    for key in planned:
        if getattr(old, key) != getattr(new, key):
            way = "; until.method=anytime may take more seeds" if old.method == "looks" else ""
            raise UserError(
                f"{folder}: until.{key} is {getattr(old, key)} there and {getattr(new, key)} here, and is planned before "
                f"the first run{way}"
            )
    return new, None


def _same_but_for_growth(there: Study, here: Study, folder: Path) -> None:
    """Raises `UserError` where more differs than further seeds and arms."""
    for name, changes in there.arms.items():
        if name not in here.arms:
            raise UserError(
                f"{folder} holds another study: it has an arm {name}, this one has not; choose another --output"
            )
        if (name in there.controls) != (name in here.controls) or changes != here.arms[name]:
            raise UserError(
                f"{folder} holds another arm {name}: {_told(changes, here.arms[name])}; give it another name"
            )
    # What runs answer besides is no part of the verdict, and may be asked of finished ones.
    grows = ("arms", "controls", "seeds", "until", "downstream")
    old, new = ({k: v for k, v in s.to_dict().items() if k not in grows} for s in (there, here))
    if old != new:
        raise UserError(f"{folder} holds another study: {_told(old, new)}; choose another --output")
    if here.seeds[: len(there.seeds)] != there.seeds and there.seeds[: len(here.seeds)] != here.seeds:
        raise UserError(
            f"{folder} holds seeds {_short(there.seeds)}, not {_short(here.seeds)}; choose another --output"
        )
    if len(here.seeds) < len(there.seeds) and here.until is None:
        raise UserError(
            f"{folder} holds {len(there.seeds)} seeds, more than {len(here.seeds)}; what is planned is not taken away: "
            f"write seeds={len(there.seeds)}, or choose another --output"
        )


def _told(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every dot-key that differs, with both values."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    return (
        ", ".join(
            f"{key} is {_short(flat_old.get(key))} there and {_short(flat_new.get(key))} here"
            for key in dict.fromkeys([*flat_old, *flat_new])
            if flat_old.get(key) != flat_new.get(key)
        )
        or "it is a control in one of them"
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
