"""A page as a parser sees it, and as a browser does."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
NEVER_CLOSED = {"html", "wbr", "br", "img", "meta", "link", "image", "path", "circle"}


class Page(HTMLParser):
    """Tags, names of tags and attributes, links, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names += [tag, *(name for name, _ in attrs)]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in NEVER_CLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in NEVER_CLOSED:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder over HTTP: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(_Quiet):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def send_head(self) -> Any:
            asked.append(self.path)
            return super().send_head()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def browse(address: str, folder: Path, size: tuple[int, int] = (1280, 2000), dark: bool = False) -> dict[str, Any]:
    """Open a page in headless Chromium.

    Returns ``console``, what it wrote there; ``requests``, every address that the page fetched or wanted to fetch, the
    browser's own errands left out; and ``picture``, the screenshot's file.
    """
    log, picture = folder / "net.json", folder / f"page-{size[0]}{'-dark' * dark}.png"
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--no-first-run", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}",
            f"--blink-settings=preferredColorScheme={int(not dark)}",
            "--enable-logging=stderr", f"--log-net-log={log}", f"--screenshot={picture}", address,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = re.findall(r"CONSOLE\S* (.*)", done.stderr)
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    own = {one["url"] for one in asked if one["initiator"] != "not an origin" and not one["url"].startswith("data:")}
    return {"console": console, "requests": sorted(own), "picture": picture}
