"""One HTML file that holds everything it shows: text, tables, drawings, interactive charts.

    page = Page("Which shape wins?", subtitle="quickstart")
    page.verdict("No difference detected.")
    page.section("Differences", page.text("…"), page.chart(altair_chart))
    page.write(Path("report.html"))

Vega is inlined once, charts that share data hold it once, and a content security policy forbids every request,
so the page opens offline and shows the same in ten years. It follows light and dark and any width.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entasis import files

if TYPE_CHECKING:
    import altair

    from entasis.report.tables import Table

# Nothing may be fetched; Vega compiles its expressions through its interpreter, so no eval is needed either.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"


class Html(str):
    """A piece of finished HTML. Everything else given to a page is escaped."""


class Page:
    """Collects sections and writes them as one self-contained file."""

    def __init__(self, title: str, *, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._body: list[str] = []
        self._charts: list[dict[str, Any]] = []
        self._datasets: dict[str, Any] = {}

    def verdict(self, sentence: str) -> None:
        """The answer, in a sentence, set large; each line a paragraph."""
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in sentence.split("\n"))
        self._body.append(f'<div class="verdict" id="verdict">{lines}</div>')

    def section(self, heading: str, *blocks: str) -> None:
        """A heading with blocks under it; a plain string becomes a paragraph."""
        content = "\n".join(b if isinstance(b, Html) else f"<p>{html.escape(b)}</p>" for b in blocks)
        self._body.append(f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>")

    def note(self, text: str) -> Html:
        """A quiet paragraph: how to read what stands above it."""
        return Html(f'<p class="note">{html.escape(text)}</p>')

    def command(self, text: str) -> Html:
        """Something to type, or a file's text."""
        return Html(f"<pre>{html.escape(text)}</pre>")

    def folded(self, summary: str, *blocks: str) -> Html:
        """Blocks that open on a click."""
        return Html(f"<details><summary>{html.escape(summary)}</summary>{''.join(blocks)}</details>")

    def facts(self, pairs: Mapping[str, object]) -> Html:
        """Names and values under each other."""
        rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in pairs.items())
        return Html(f"<dl>{''.join(rows)}</dl>")

    def table(self, table: Table) -> Html:
        """A table that scrolls sideways where the screen is narrow."""
        return Html(f'<div class="scroll">{table.html()}</div>')

    def columns(self, drawings: Sequence[tuple[str, str, str]], key: str = "") -> Html:
        """Drawings (SVG text, title, caption) side by side, as many as fit."""
        figures = (
            f"<figure>{svg}<figcaption>{html.escape(title)}<small>{html.escape(caption)}</small></figcaption></figure>"
            for svg, title, caption in drawings
        )
        return Html(f'<div class="columns">{"".join(figures)}</div>{key}')

    def chart(self, chart: altair.TopLevelMixin) -> Html:
        """An interactive chart. One with `width="container"` fills the page."""
        return self._place(chart, hidden=False)

    def switch(self, charts: Mapping[str, altair.TopLevelMixin]) -> Html:
        """Several charts in one place; the reader switches between them by name."""
        buttons, places = [], []
        for i, (name, chart) in enumerate(charts.items()):
            places.append(self._place(chart, hidden=i > 0))
            buttons.append(
                f'<button role="tab" aria-selected="{str(i == 0).lower()}" '
                f'aria-controls="chart-{len(self._charts) - 1}">{html.escape(name)}</button>'
            )
        return Html(f'<div class="tabs" role="tablist">{"".join(buttons)}</div>{"".join(places)}')

    def render(self) -> str:
        """The whole page as text."""
        subtitle = f"<p>{html.escape(self.subtitle)}</p>" if self.subtitle else ""
        scripts = (
            f"<script>{_vega()}</script>\n<script>{_resource('page.js')}</script>" if self._charts else ""
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_resource('page.css')}</style>\n</head>\n<body>\n"
            f"<header><div><h1>{html.escape(self.title)}</h1>{subtitle}</div>"
            '<button id="theme" title="light or dark" aria-label="light or dark">◐</button></header>\n'
            + "\n".join(self._body)
            + f'\n<script type="application/json" id="datasets">{_json(self._datasets)}</script>\n'
            f'<script type="application/json" id="charts">{_json(self._charts)}</script>\n{scripts}\n</body>\n</html>\n'
        )

    def write(self, path: Path) -> None:
        """Writes the page aside and renames it, replacing an earlier one."""
        files.write_text(path, self.render())

    def _place(self, chart: altair.TopLevelMixin, *, hidden: bool) -> Html:
        spec = chart.to_dict()
        # Altair names each data set by its content, so charts that share data share it here too.
        own = spec.pop("datasets", {})
        self._datasets.update(own)
        self._charts.append(spec)
        number = len(self._charts) - 1
        names = spec.get("usermeta", {}).get("legend", [])
        if names:
            _drop_legend(spec)
        spec.setdefault("description", _describe(spec))
        return Html(
            f'<div class="chart" id="chart-{number}" data-chart="{number}" data-uses="{" ".join(own)}" role="figure" '
            f'aria-label="{html.escape(spec["description"])}"{" hidden" if hidden else ""}></div>'
            + _legend(names, number)
        )


def _drop_legend(part: dict[str, Any]) -> None:
    """Leaves a chart's own legend out, which loses names where they do not fit."""
    if colour := part.get("encoding", {}).get("color"):
        colour["legend"] = None
    for inner in part.get("layer", []):
        _drop_legend(inner)


def _describe(spec: dict[str, Any]) -> str:
    """A chart's name for who cannot see it: what its axes show."""

    def titles(part: Any, axis: str) -> list[str]:
        if isinstance(part, list):
            return [t for p in part for t in titles(p, axis)]
        if not isinstance(part, dict):
            return []
        own = part.get("encoding", {}).get(axis, {})
        mine = [str(own.get("title") or own.get("field") or "")] if own else []
        return [t for t in mine if t] + titles(part.get("layer"), axis) + titles(part.get("hconcat"), axis)

    y, x = ([*titles(spec, axis), "values"][0] for axis in "yx")
    return f"Chart: {' '.join(y.split())} against {' '.join(x.split())}"


def _legend(names: Sequence[tuple[str, str]], number: int) -> str:
    """A button for each name: pressed ones are brought forward."""
    if not names:
        return ""
    buttons = "".join(
        f'<button type="button" aria-pressed="false" data-name="{html.escape(name)}">'
        f'<i style="background:{colour}"></i>{html.escape(name)}</button>'
        for name, colour in names
    )
    return f'<div class="legend" role="group" aria-label="bring forward" data-for="chart-{number}">{buttons}</div>'


def _json(value: Any) -> str:
    # NaN is not JSON, and "</script" inside a string would end the element that holds it.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def _resource(name: str) -> str:
    return resources.files("entasis.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script (0.9 MB) from vl-convert, without any network."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return script.replace("</script", "<\\/script")
