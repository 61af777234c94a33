"""One table, written as HTML, CSV, LaTeX (booktabs) and for the terminal.

A column has a key, a heading, a unit, and a format for its values; a missing value (None or NaN) is a dash in
every form that is read, and empty in CSV.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True, slots=True)
class Column:
    """`form` is a format specification (`,.0f`, `+.4f`); empty means text, set to the left."""

    key: str
    heading: str
    form: str = ""
    unit: str = ""
    wrap: bool = False

    def show(self, value: Any) -> str:
        """The value as read; a dash where there is none."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        return format(value, self.form).replace("-", "−") if self.form else str(value)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows are mappings from column keys to plain values."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def html(self) -> str:
        """A `<table>`, text to the left and numbers to the right."""

        def cell(tag: str, column: Column, content: str) -> str:
            kinds = " ".join(k for k, on in (("text", not column.form), ("wrap", column.wrap)) if on)
            marked = f' class="{kinds}"' if kinds else ""
            return f"<{tag}{marked}>{content}</{tag}>"

        head = "".join(
            cell(
                "th", c, html.escape(c.heading) + (f"<small>{html.escape(c.unit)}</small>" if c.unit else "")
            )
            for c in self.columns
        )
        body = "".join(
            "<tr>"
            + "".join(cell("td", c, html.escape(c.show(row.get(c.key)))) for c in self.columns)
            + "</tr>\n"
            for row in self.rows
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"

    def csv(self) -> str:
        """Full precision, keys as the header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([c.key for c in self.columns])
        for row in self.rows:
            values = [row.get(c.key) for c in self.columns]
            writer.writerow(
                ["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in values]
            )
        return out.getvalue()

    def latex(self) -> str:
        """A booktabs `tabular`; needs only `\\usepackage{booktabs}`."""
        layout = "".join("r" if c.form else "l" for c in self.columns)
        heads = [_latex(c.heading + (f" ({c.unit})" if c.unit else "")) for c in self.columns]
        lines = [f"\\begin{{tabular}}{{{layout}}}", "\\toprule", " & ".join(heads) + r" \\", "\\midrule"]
        lines += [
            " & ".join(_latex(c.show(row.get(c.key))) for c in self.columns) + r" \\" for row in self.rows
        ]
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])

    def rich(self, title: str = "") -> rich.table.Table:
        """For the terminal."""
        import rich.box
        import rich.table

        result = rich.table.Table(title=title or None, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for c in self.columns:
            result.add_column(
                c.heading + (f"\n[dim]{c.unit}[/dim]" if c.unit else ""),
                justify="right" if c.form else "left",
            )
        for row in self.rows:
            result.add_row(*(c.show(row.get(c.key)) for c in self.columns))
        return result


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "×": r"$\times$", "±": r"$\pm$",
    "…": r"\ldots{}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
