"""What the runs of a study left in their folders, read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entasis.errors import Damaged, UserError
from entasis.files import hash_of, read_json
from entasis.study.arms import Findings
from entasis.study.config import Study, Sweep
from entasis.study.executors.launchers import failure_note
from entasis.study.plan import Plan, PlannedRun


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    run: PlannedRun
    folder: Path
    result: dict[str, Any]

    @property
    def label(self) -> str:
        """Its arm, with the protocol where that made another run of it."""
        return self.run.folder.split("/")[1]

    @property
    def bits_per_byte(self) -> float:
        """On the held-out corpus, after the last step."""
        return float(self.result["validation"]["bits_per_byte"])

    @property
    def flops(self) -> int:
        """Training FLOPs of it, what its plan measured included: a plan that measures need not keep to what was expected."""
        measured = self.result.get("importance", {}).get("flops", 0)
        return round(self.result["tokens"] * self.result["flops_per_token"] + measured)

    @cached_property
    def documents(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(NLL in nats, UTF-8 bytes) of each held-out document, in the order of what they are known by."""
        arrays = self._arrays
        order = slice(None) if self.identity is None else np.argsort(self.identity, kind="stable")
        nll, size = arrays["document_nll"][order], arrays["document_bytes"][order]
        return nll.astype(np.float64), size.astype(np.float64)

    @property
    def identity(self) -> NDArray[np.uint64] | None:
        """What the held-out documents are known by, in the file's order; None in runs of earlier versions."""
        return self._arrays.get("document_hashes")

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.folder / "validation.safetensors"
        told = self.result.get("files", {}).get(path.name)
        if path.is_file() and told not in (None, hash_of(path)):
            raise Damaged(f"damaged: {path} is not what the run wrote; restore it, or run again")
        try:
            return load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise Damaged(f"damaged: {path}: {error}") from error

    def check(self) -> None:
        """Compares the told score with the documents' own. Raises `Damaged`."""
        if not self.result["validation"]:
            return
        nll, size = self.documents
        found = float(nll.sum() / (size.sum() * math.log(2)))
        if not math.isclose(found, self.bits_per_byte, rel_tol=1e-9):
            raise Damaged(
                f"damaged: {self.folder / 'result.json'} says {self.bits_per_byte:.6f} bits per byte, the documents in "
                f"validation.safetensors {found:.6f}; remove the run's folder to train it again"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, one a step. Raises `Damaged`."""
        path = self.folder / "metrics.jsonl"
        told = self.result.get("files", {}).get(path.name)
        try:
            if told not in (None, hash_of(path)):
                raise Damaged(f"damaged: {path} is not what the run wrote; restore it, or run again")
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Damaged(f"damaged: {path}: {error}; restore it, or run again") from error

    def environment(self) -> dict[str, Any]:
        """The run's `environment.json`."""
        return json_of(self.folder / "environment.json")


def outcome(folder: Path, run: PlannedRun) -> Outcome | None:
    """The finished run, or None. Raises `Damaged` where its files contradict one another."""
    path = folder / run.folder / "result.json"
    if not path.is_file():
        return None
    found = Outcome(run, folder / run.folder, read_json(path))
    found.check()
    return found


def outcomes(folder: Path, runs: Iterable[PlannedRun]) -> dict[str, Outcome]:
    """Finished runs by their folder."""
    found = ((run.folder, outcome(folder, run)) for run in runs)
    return {name: o for name, o in found if o is not None}


def failures(folder: Path, runs: Iterable[PlannedRun]) -> dict[str, str]:
    """Why runs failed, by their folder."""
    notes = {run.folder: failure_note(folder, run) for run in runs}
    return {name: path.read_text(encoding="utf-8").strip() for name, path in notes.items() if path.is_file()}


def findings(study: Study, folder: Path, runs: Iterable[PlannedRun], speeds: Mapping[str, float]) -> Findings:
    """What the preparatory runs say, each arm's best learning rate, beside each arm's measured speed."""
    done = list(outcomes(folder, runs).values())
    rates: dict[str, float] = {}
    for arm in study.arms:
        scores = sweep_scores(done, arm, study.sweep)
        if scores:
            rates[arm] = min(scores, key=lambda multiplier: scores[multiplier])
    return Findings(multiplier=rates, tokens_per_second=dict(speeds))


def too_late(study: Study, folder: Path, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Sweep runs without a result that none is wanted of: main runs have begun at the rate that was chosen without it.

    Trained now, one could be the best, and those runs would be of another rate than the study plans.
    """
    begun = {path.parts[-3].split("@")[0] for path in folder.glob("runs/*/*/recipe.yaml")}
    if begun & set(study.controls):
        begun.add(study.baseline)  # whose rate they take
    return [
        run
        for run in runs
        if run.kind == "sweep" and run.arm in begun and not (folder / run.folder / "result.json").is_file()
    ]


def sweep_scores(done: Iterable[Outcome], arm: str, sweep: Sweep | None) -> dict[float, float]:
    """Mean bits per byte of one arm at each multiplier of the learning rate that all seeds of the sweep finished.

    One that diverged for a seed would be judged by the survivors.
    """
    scores: dict[float, list[float]] = {}
    for o in done:
        if o.run.kind == "sweep" and o.run.arm == arm:
            scores.setdefault(o.run.multiplier, []).append(o.bits_per_byte)
    seeds = len(sweep.seeds) if sweep else 0
    return {m: float(np.mean(values)) for m, values in sorted(scores.items()) if len(values) == seeds}


def paired(
    plan_runs: Mapping[str, list[PlannedRun]], done: Mapping[str, Outcome], arm: str, baseline: str
) -> list[tuple[Outcome, Outcome]]:
    """(baseline's run, arm's run) for every seed that both have finished.

    Raises `UserError` where the two were scored on different documents.
    """
    base = {run.seed: done.get(run.folder) for run in plan_runs[baseline]}
    pairs = ((base[run.seed], done.get(run.folder)) for run in plan_runs[arm])
    both = [(b, a) for b, a in pairs if b is not None and a is not None]
    for b, a in both:
        known = b.identity is not None and a.identity is not None
        ids = known and not np.array_equal(np.sort(b.identity), np.sort(a.identity))  # type: ignore[arg-type]
        if ids or not np.array_equal(b.documents[1], a.documents[1]):
            raise UserError(
                f"{a.folder} and {b.folder} were scored on different documents; their scores cannot be compared"
            )
    return both


def seeds_of(plan: Plan) -> list[int]:
    """All seeds of the main grid."""
    return sorted({run.seed for run in plan.runs})


def json_of(path: Path) -> Any:
    """The mapping in a JSON file. Raises `Damaged`."""
    return read_json(path)
