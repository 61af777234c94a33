"""A real Chromium for tests: what is on the page after its scripts ran."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROBE = """<script>
addEventListener("load", () => setInterval(() => {
  const root = document.documentElement;
  root.dataset.width = innerWidth;
  root.dataset.overflow = root.scrollWidth - root.clientWidth;
  root.dataset.background = getComputedStyle(document.body).backgroundColor;
}, 50));
</script>"""

NARROWEST = 500
"""Pixels: Chromium's windows are no narrower, so a phone is a frame, whose page takes the window's place at the end."""
FRAME = """<body style="margin:0"><iframe style="border:0" width="%d" height="900" src="%s"></iframe><script>
setTimeout(() => setInterval(() => {
  const inside = document.querySelector("iframe").contentDocument.documentElement;
  if (!inside.dataset.width) return;  // on a busy machine it comes late
  document.replaceChild(document.importNode(inside, true), document.documentElement);
}, 50), 6000);
</script></body>"""


def find() -> str:
    """The browser's path; skips the test with the reason where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed (apt-get install chromium), so the page was not looked at")
    return path


def dom(page: Path, folder: Path, *, width: int = 1100, theme: str = "light", click: str = "") -> str:
    """The page's DOM once it is drawn, with its width, overflow and background noted on `<html>`.

    `click` is a CSS selector of a button to press.
    """
    chromium = find()
    wait = f'addEventListener("load", () => setTimeout(() => document.querySelector({click!r}).click(), 300))'
    press = f"<script>{wait};</script>"
    copy = folder / f"{page.stem}-{width}-{theme}.html"
    # The last one: the scripts' own text holds others.
    before, _, after = page.read_text(encoding="utf-8").rpartition("</body>")
    copy.write_text(before + PROBE + (press if click else "") + "</body>" + after, encoding="utf-8")
    shown = copy
    if width < NARROWEST:
        shown = copy.with_name(f"phone-{copy.name}")
        shown.write_text(FRAME % (width, f"{copy.name}#{theme}"), encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, NARROWEST)},900", "--virtual-time-budget=8000",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files",
        "--dump-dom", f"{shown.as_uri()}#{theme}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def printed(page: Path, folder: Path) -> list[str]:
    """The text of each A4 page that the browser prints; skips the test with the reason without pdftotext."""
    chromium = find()
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext is installed (apt-get install poppler-utils), so nothing was printed")
    pdf = folder / f"{page.stem}.pdf"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--print-to-pdf={pdf}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    text = subprocess.run(["pdftotext", "-layout", str(pdf), "-"], capture_output=True, check=True, text=True)
    return text.stdout.split("\f")[:-1]
