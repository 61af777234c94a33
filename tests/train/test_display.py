import io

import pytest
from rich.console import Console

from entasis.progress import bars
from entasis.train.display import Display, sparkline
from entasis.train.metrics import records
from entasis.train.run import train


def screen() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)


def test_the_table_of_a_run_fits_80_columns_and_ends_on_its_last_numbers(recipe, tmp_path):
    console = screen()
    with Display(tmp_path / "run", live=True, console=console) as display:
        result = train(recipe(), tmp_path / "run", reporter=display)
    shown = console.file.getvalue()
    last = shown[shown.rindex(str(tmp_path.name)) :].splitlines()
    assert max(map(len, last)) <= 80
    rows = records(tmp_path / "run")
    text = "\n".join(last)
    assert f"{result['steps']} of {result['steps']}" in text
    assert f"{result['loss']:.4f}" in text  # the mean of the last ten steps, as in result.json
    assert f"{rows[-1]['tokens']:,}" in text
    assert f"{result['validation']['bits_per_byte']:.4f} bits/byte" in text


def test_without_a_terminal_there_are_lines(recipe, tmp_path):
    console = Console(file=io.StringIO(), width=80)
    with Display(tmp_path / "run", live=True, console=console) as display:
        result = train(recipe(), tmp_path / "run", reporter=display)
    lines = console.file.getvalue().splitlines()
    assert f"step {result['steps']}/{result['steps']}  loss" in lines[-2]
    assert lines[-1].endswith(f"validation {result['validation']['bits_per_byte']:.4f} bits per byte")
    assert not any("\x1b" in line for line in lines)


def test_a_sparkline_falls_where_the_values_fall():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert len(sparkline(list(range(1000)), 20)) == 20
    assert sparkline([1.0], 5) == "▁"


@pytest.mark.parametrize(
    ("unit", "says"),
    [("bytes", "reading: 0.4 MB of 3.0 MB"), ("tokens", "reading: 400,000 tokens of 3,000,000 tokens")],
)
def test_progress_without_a_terminal_is_a_line_now_and_then(unit, says, monkeypatch):
    clock = iter(range(1000))  # every call a second later
    monkeypatch.setattr("entasis.progress.time.monotonic", lambda: float(next(clock)))
    console = Console(file=io.StringIO(), width=80)
    with bars(unit, console=console) as advance:
        advance("opening", 0, None)  # a moment's work is not worth a line
        for done in range(100_000, 3_000_000, 100_000):
            advance("reading", done, 3_000_000)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == says
    assert len(lines) == 3 and lines[1].endswith("left")


def test_progress_on_a_terminal_is_a_bar_with_the_time_left():
    console = screen()
    with bars("tokens", console=console) as advance:
        advance("scoring", 5, 10)
    shown = console.file.getvalue()
    assert "scoring" in shown and "5/10" in shown and "tokens" in shown
