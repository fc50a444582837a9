"""Opens a page in headless Chromium and says what is wrong with it, at several widths at once.

The page is shown in frames of those widths by another page, whose script looks into them. The
server of both is the browser's only way out, so that nothing leaves this machine.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOST = "http://page.test"
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--enable-logging=stderr", "--dump-dom",
    "--window-size=1400,1000",
)  # fmt: skip

PROBE = """<!doctype html><meta charset="utf-8"><body>FRAMES<pre id="found"></pre><script>
function look(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, problems = [];
  const say = (what, node) => problems.push(what + ": " + node.textContent.trim().slice(0, 60));
  for (const plot of page.querySelectorAll("figure svg")) {
    const box = plot.getBoundingClientRect(), name = plot.getAttribute("aria-label");
    if (box.width < 200 || box.height < 20) problems.push("plot too small: " + name);
    if (box.left < 0 || box.right > view.innerWidth) problems.push("plot cut off: " + name);
    const texts = [...plot.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([text, at], i) => {
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 ||
          at.bottom > box.bottom + 1) say("text outside its plot", text);
      const scale = box.width / plot.viewBox.baseVal.width;
      if (scale * parseFloat(view.getComputedStyle(text).fontSize) < 9) say("small text", text);
      for (const [other, by] of texts.slice(i + 1))
        if (Math.min(at.right, by.right) - Math.max(at.left, by.left) > 1 &&
            Math.min(at.bottom, by.bottom) - Math.max(at.top, by.top) > 2.5)
          say("overlapping texts", {textContent: text.textContent + " and " + other.textContent});
    });
  }
  const wide = page.documentElement.scrollWidth;
  if (wide > view.innerWidth) problems.push("page too wide: " + wide);
  const requests = view.performance.getEntriesByType("resource").map(entry => entry.name);
  const plots = page.querySelectorAll("figure svg").length;
  return {width: view.innerWidth, plots, requests, problems};
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


class View(NamedTuple):
    """What a page is at one width: its plots, what it asked for, and what is wrong."""

    width: int
    plots: int
    requests: list[str]
    problems: list[str]


class Look(NamedTuple):
    """What a browser saw, and what it said of scripts."""

    views: list[View]
    console: list[str]


def look(page: str, widths: Sequence[int] = (360, 1200)) -> Look:
    """Open a page at each width."""
    frames = "".join(
        f'<iframe src="/page?{width}" style="border: 0; height: 900px; width: {width}px"></iframe>'
        for width in widths
    )
    own = {f"{HOST}/probe": PROBE.replace("FRAMES", frames)}
    own |= {f"{HOST}/page?{width}": page for width in widths}
    with _server(own) as address, tempfile.TemporaryDirectory() as profile:
        assert CHROMIUM is not None
        way_out = (f"--proxy-server={address}", "--proxy-bypass-list=<-loopback>")
        command = [CHROMIUM, *OPTIONS, *way_out, f"--user-data-dir={profile}", f"{HOST}/probe"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: list[dict[str, Any]] = json.loads(
        html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Look([View(**view) for view in found], console)


@contextmanager
def _server(pages: dict[str, str]) -> Iterator[str]:
    """The address of a proxy that has these pages and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(pages.get(self.path, "").encode())

        def log_message(self, format: str, *words: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
