"""`verdict.json`: written, read back, also as earlier versions wrote it, and damaged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from entasis.cli import main
from entasis.errors import Damaged
from entasis.files import SEAL
from entasis.study import verdict

RESULTS = sorted(Path(__file__).parents[2].glob("results/*/verdict.json"))


def same(there: Any, here: Any) -> bool:
    """Whether `here` says all that `there` says."""
    if isinstance(there, dict):
        return all(key in here and same(value, here[key]) for key, value in there.items())
    return bool(there == here)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_published_verdicts_are_read_and_written_as_they_are(path: Path, tmp_path: Path) -> None:
    told = json.loads(path.read_text())
    found = verdict.read(path.parent)
    assert all(p.arms[found.baseline].difference is None for p in found.protocols.values())
    verdict.write(tmp_path, found)
    written = json.loads((tmp_path / "verdict.json").read_text())
    assert len(written.pop(SEAL)) == 32
    assert same({k: v for k, v in told.items() if k != SEAL}, written)
    assert verdict.holds(tmp_path, found) and verdict.plain(verdict.read(tmp_path)) == verdict.plain(found)


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_again() -> None:
    found = verdict.read(RESULTS[0].parents[1] / "where-capacity-belongs-nano")
    d = next(arm.difference for arm in found.protocols["params"].arms.values() if arm.difference)
    assert math.isnan(d.p_pooled) and verdict.plain(d)["p_pooled"] is None
    assert "looks" not in verdict.plain(found.protocols["params"].arms[found.baseline])


@pytest.mark.parametrize("value", [{}, {"params": 3}, {"params": {"arms": {"plain": {"scores": [1]}}}}])
def test_a_file_that_is_no_verdict_is_one_line(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verdict.json").write_text(json.dumps({"study": "s", "protocols": value}))
    with pytest.raises(Damaged, match=r"verdict\.json: "):
        verdict.read(tmp_path)
    assert main(["study", "compare", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_changed_number_is_seen(tmp_path: Path) -> None:
    verdict.write(tmp_path, verdict.read(RESULTS[0].parent))
    path = tmp_path / "verdict.json"
    path.write_text(path.read_text().replace('"margin": 0.01', '"margin": 0.02'))
    with pytest.raises(Damaged, match="was changed after it was written"):
        verdict.read(tmp_path)
