"""Real prose from a Debian package, for the studies that read `prose/`.

    python benchmarks/prose.py

Downloads the package `anarchism` (An Anarchist FAQ: 11 MB of continuous modern prose, GPL-2 or later, never
vendored), takes the text out of its pages and writes one file a page to `prose/`. Needs Debian's apt-get and
dpkg-deb, but no root.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

PACKAGE = "anarchism"
BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "li", "blockquote", "div", "br", "tr", "title"}
SILENT = {"script", "style", "head", "nav"}


class Text(HTMLParser):
    """Collects what a reader sees: paragraphs as lines, white space folded."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in SILENT
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in SILENT))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        lines = (line.strip() for line in "".join(self.parts).split("\n"))
        return "\n\n".join(line for line in lines if line) + "\n"


def main() -> None:
    """Writes `prose/`; leaves it alone where it is."""
    output = Path("prose")
    if output.exists():
        raise SystemExit(f"{output}/ is there already")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        subprocess.run(["apt-get", "download", "-qq", PACKAGE], cwd=folder, check=True)
        package = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "x"], cwd=folder, check=True)
        aside = Path(folder) / "prose"
        aside.mkdir()
        size = 0
        for page in sorted(Path(folder, "x").rglob("*.html")):
            parser = Text()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            size += (aside / f"{page.stem}.txt").write_text(parser.text(), encoding="utf-8")
        aside.rename(output)
    print(
        f"{output}/: {len(list(output.iterdir()))} pages, {size / 1e6:.1f} M characters, from {package.stem}"
    )


if __name__ == "__main__":
    main()
