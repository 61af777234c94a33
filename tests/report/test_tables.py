"""One table in four forms."""

import csv
import io
import math

from entasis.report.tables import Column, Table

TABLE = Table(
    [
        Column("arm", "arm"),
        Column("n", "parameters", ",d"),
        Column("d", "difference", "+.4f", "bits & bytes"),
    ],
    [{"arm": "a_b", "n": 1234567, "d": -0.01234}, {"arm": "<c>", "n": None, "d": math.nan}],
)


def test_html_escapes_and_dashes_what_is_missing() -> None:
    text = TABLE.html()
    assert "&lt;c&gt;" in text and "1,234,567" in text and "−0.0123" in text and text.count("<td>–</td>") == 2


def test_csv_keeps_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert rows[0] == {"arm": "a_b", "n": "1234567", "d": "-0.01234"}
    assert rows[1] == {"arm": "<c>", "n": "", "d": ""}


def test_latex_is_booktabs_with_special_characters_escaped() -> None:
    text = TABLE.latex()
    assert text.startswith("\\begin{tabular}{lrr}\n\\toprule\n")
    assert r"a\_b & 1,234,567 & $-$0.0123 \\" in text and r"difference (bits \& bytes)" in text
    assert r"<c> & -- & -- \\" in text and "\\bottomrule" in text
