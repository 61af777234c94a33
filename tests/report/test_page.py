"""The page holds everything it shows, shows it in a real browser, and lets no request out."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser

from entasis.files import write_text
from entasis.report import charts
from entasis.report.page import Page
from entasis.report.tables import Column, Table

ARMS = ["plain", "crown"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = Page("Which <shape> wins?", subtitle="2 arms & 2 seeds")
    result.verdict("No difference detected; this study could have seen 0.0080 bits per byte.")
    rows = [
        {"arm": a, "seed": f"seed {s}", "tokens": t * 1000, "flops": t * 1e9, "loss": 5 - t / 50 + s / 10}
        for a in ARMS
        for s in range(2)
        for t in range(1, 40)
    ]
    curves = {
        name: charts.lines(
            rows, x=x, x_title=name, y="loss", y_title="loss", series="arm", repeat="seed", order=ARMS
        )
        for name, x in (("tokens", "tokens"), ("FLOPs", "flops"))
    }
    forest = [
        {"arm": "crown", "mean": -0.01, "low": -0.02, "high": 0.0, "total_low": -0.03, "total_high": 0.01,
         "values": {"seed 0": -0.012, "seed 1": -0.008}, "says": "no difference detected"}
    ]  # fmt: skip
    table = Table([Column("arm", "arm"), *(Column(f"c{i}", f"column {i}", ",.3f") for i in range(12))],
                  [{"arm": "crown", **{f"c{i}": 12345.6789 for i in range(12)}}])  # fmt: skip
    result.section(
        "Differences", result.chart(charts.forest(forest, title="bits per byte", order=ARMS, margin=0.01))
    )
    result.section("Loss", result.switch(curves), result.table(table))
    path = tmp_path_factory.mktemp("page") / "report.html"
    result.write(path)
    return path


def test_nothing_is_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(""", outside)


def test_data_shared_by_charts_is_held_once(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count('"tokens":39000') == 4  # once for each of the four curves


def test_text_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "Which &lt;shape&gt; wins?" in text and "<shape>" not in text


@pytest.mark.parametrize(("width", "theme", "background"), [
    (1100, "light", "rgb(255, 255, 255)"), (1100, "dark", "rgb(22, 21, 20)"), (390, "light", "rgb(255, 255, 255)")
])  # fmt: skip
def test_a_browser_draws_every_chart(
    page: Path, tmp_path: Path, width: int, theme: str, background: str
) -> None:
    dom = browser.dom(page, tmp_path, width=width, theme=theme)
    assert 'data-ready="yes"' in dom and 'data-drawn="failed"' not in dom
    assert dom.count('data-drawn="yes"') == 2  # the forest plot and the first of the switched charts
    assert f'data-width="{width}"' in dom and 'data-overflow="0"' in dom
    assert f'data-background="{background}"' in dom
    assert "No difference detected; this study could have seen" in dom
    svg = "".join(re.findall(r"<svg.*?</svg>", dom, flags=re.S))
    assert "crown" in svg and "bits per byte" in svg


def test_a_click_switches_the_chart(page: Path, tmp_path: Path) -> None:
    dom = browser.dom(page, tmp_path, click=".tabs button:nth-child(2)")
    assert dom.count('data-drawn="yes"') == 3
    assert re.search(r'id="chart-1"[^>]*hidden', dom) and not re.search(r'id="chart-2"[^>]*hidden', dom)


def test_charts_are_saved_for_paper(tmp_path: Path) -> None:
    points = [{"arm": a, "seed": "seed 0", "score": 1.5 + i, "place": i} for i, a in enumerate(ARMS)]
    chart = charts.slopes(points, y="score", y_title="bits per byte", series="arm", repeat="seed", order=ARMS)
    charts.save(chart, tmp_path / "runs")
    assert "bits per byte" in (tmp_path / "runs.svg").read_text(encoding="utf-8")
    assert (tmp_path / "runs.pdf").read_bytes().startswith(b"%PDF")


def test_what_only_a_pointer_brings_out_is_not_saved(tmp_path: Path) -> None:
    """A study of a hundred runs had drawings of fifteen megabytes."""
    rows = [{"arm": "a", "seed": 0, "tokens": i, "loss": 3 - i / 50, "place": i / 100} for i in range(100)]
    chart = charts.lines(
        rows, x="tokens", x_title="tokens", y="loss", y_title="loss", series="arm", repeat="seed", order=["a"]
    )
    charts.save(chart, tmp_path / "loss")
    drawn = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    assert drawn.count("<path") < 50 and max(line.count("L") for line in drawn.split("<path")) >= 99
    assert "hovered" in str(chart.to_dict())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "old" and len(list(tmp_path.iterdir())) == 1


MANY = [f"{name}-{how}" for name in ("vanilla", "framed", "crown", "taper", "middle") for how in ("plain", "shuffled", "reversed")]  # fmt: skip


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen arms, wide tables, and headings near the ends of pages."""
    rows = [
        {"arm": a, "seed": f"seed {s}", "tokens": t * 1000, "loss": 5 - t / 50 + i / 30, "place": i}
        for i, a in enumerate(MANY)
        for s in range(2)
        for t in range(1, 9)
    ]
    page = Page("Fifteen arms")
    words = {"y": "loss", "y_title": "training loss", "series": "arm", "repeat": "seed", "order": MANY}
    curves = charts.lines(rows, x="tokens", x_title="tokens", **words)
    columns = [
        Column("arm", "arm"),
        *(Column(f"c{i}", f"column {i}", "+.4f", "mean of seeds") for i in range(9)),
    ]
    columns.append(Column("says", "judgement", wrap=True))
    body = [
        {"arm": a, **{f"c{i}": -1.2345 for i in range(9)}, "says": "no difference detected"} for a in MANY
    ]
    for i in range(6):
        page.section(
            f"Heading {i}",
            page.chart(curves if i % 2 else charts.slopes(rows, **words)),
            *["words " * 70] * i,
        )
        page.section(f"Table {i}", page.table(Table(columns, body)))
    path = tmp_path_factory.mktemp("long") / "long.html"
    page.write(path)
    return path


@pytest.mark.parametrize("width", [1100, 390])
def test_a_legend_shows_every_name_and_a_button_brings_one_forward(
    long_page: Path, tmp_path: Path, width: int
) -> None:
    dom = browser.dom(long_page, tmp_path, width=width, click=f'.legend button[data-name="{MANY[3]}"]')
    assert 'data-drawn="failed"' not in dom and 'data-overflow="0"' in dom
    legend = re.search(r'<div class="legend".*?</div>', dom, flags=re.S)
    assert legend and re.findall(r"</i>([^<]+)</button>", legend[0]) == MANY
    assert legend[0].count('aria-pressed="true"') == 1
    first = dom[dom.index('id="chart-1"') : dom.index('id="chart-2"')]
    assert first.count('opacity="0.08"') == 2 * (len(MANY) - 1) and first.count('opacity="0.85"') == 2
    assert re.search(r'id="chart-1"[^>]*role="[a-z-]+" aria-label="Chart: training loss against tokens"', dom)
    assert "legend-label" not in first  # the chart's own, which lost names


def test_on_paper_every_column_is_there_and_no_heading_stands_alone(long_page: Path, tmp_path: Path) -> None:
    sheets = browser.printed(long_page, tmp_path)
    text = "\n".join(sheets)
    assert text.count("judgement") >= 6 and text.count("detected") == 6 * len(MANY)
    assert text.count("column 8") >= 6
    for sheet in sheets:
        last = [line.strip() for line in sheet.splitlines() if line.strip()][-1]
        assert not re.fullmatch(r"(Heading|Table) \d", last)
