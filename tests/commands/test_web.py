"""The page of `sparsemae web` in headless Chromium: `predict`'s logits, errors in words, and no request elsewhere."""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import photographs as crops
import pytest
import reference
from conftest import ROOT
from PIL import Image

from sparsemae.cli import main
from sparsemae.commands.web import MODULES, PAGE
from sparsemae.data.images import as_rgb
from sparsemae.packing.format import write
from sparsemae.runtime import load

CHROMIUM = shutil.which("chromium")
needs_modules = pytest.mark.skipif(not all((PAGE / name).is_file() for name in MODULES), reason="needs make wasm")
SECONDS = 300
# Put at the end of the page as it is: chooses files through its own input, and sends home what it shows.
HARNESS = """
const names = await (await fetch("files.json")).json();
const input = document.getElementById("files");
const found = [];
document.addEventListener("classified", async ({ detail }) => {
  found.push(detail);
  if (found.length < names.length) return;
  const shown = [...document.querySelectorAll("#results li")].map((item) => item.innerText);
  const said = document.getElementById("model").textContent;
  const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  await fetch("result", { method: "POST", body: JSON.stringify({ found, shown, said, asked }) });
});
const transfer = new DataTransfer();
for (const name of names) {
  const blob = await (await fetch(`photographs/${encodeURIComponent(name)}`)).blob();
  transfer.items.add(new File([blob], name, { type: blob.type }));
}
input.files = transfer.files;
input.dispatchEvent(new Event("change"));
"""


class Handler(SimpleHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        added = {"/harness.js": HARNESS, "/files.json": json.dumps(self.server.names)}
        if self.path == "/":
            text = (Path(self.directory) / "index.html").read_text()
            added["/"] = text.replace("</body>", '<script type="module" src="harness.js"></script></body>')
        if self.path not in added:
            return super().do_GET()
        self.send_response(200)
        kind = {"/": "text/html; charset=utf-8", "/harness.js": "text/javascript"}
        self.send_header("Content-Type", kind.get(self.path, "application/json"))
        self.end_headers()
        self.wfile.write(added[self.path].encode())
        return None

    def do_POST(self) -> None:
        self.server.result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, site: Path, names: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(site)))
        self.names, self.asked, self.done, self.result = names, list[str](), threading.Event(), dict[str, Any]()


def browse(site: Path, profile: Path) -> tuple[dict[str, Any], list[str]]:
    """What the page sends home for the files in ``site/photographs``, and the paths that were asked for."""
    assert CHROMIUM is not None
    names = sorted(file.name for file in (site / "photographs").iterdir())
    with Server(site, names) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
             "--disable-background-networking", "--disable-component-update", "--no-first-run",
             "--enable-unsafe-swiftshader", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
             "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            assert server.done.wait(SECONDS), f"nothing came back; asked for {server.asked}"
        finally:
            os.killpg(browser.pid, 9)
            browser.wait()
            server.shutdown()
    return server.result, server.asked


def kinds(folder: Path, out: Path) -> None:
    """Twenty photographs: turned by EXIF, with alpha, gray, progressive, of 12 megapixels, and plain ones."""
    files = sorted(folder.glob("val/*/*.jpg"))[:: max(1, len(list(folder.glob("val/*/*.jpg"))) // 20)][:20]
    out.mkdir()
    for i, file in enumerate(files):
        options: dict[str, Any] = {"quality": 92}
        image, ending = Image.open(file).convert("RGB"), "jpg"
        if i < 4:
            exif = Image.Exif()
            exif[0x0112] = (3, 6, 8, 5)[i]
            image, options = image.rotate((180, 90, 270, 90)[i], expand=True), options | {"exif": exif}
        elif i < 7:
            alpha = np.full(image.size[::-1], 255, np.uint8)
            alpha[:20] = np.arange(image.width) * 255 // image.width
            image.putalpha(Image.fromarray(alpha))
            ending, options = ("png", "webp", "png")[i - 4], {"lossless": True}
        elif i < 10:
            image = image.convert("L")
        elif i < 13:
            options["progressive"] = True
        elif i < 15:
            image = image.resize((4000, 3000))
        image.save(out / f"{i:02d} {file.parent.name}.{ending}", **options)


@pytest.mark.holds_only
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@needs_modules
@pytest.mark.holds("take.4")
def test_the_page_runs_a_trained_model_in_a_browser(tmp_path: Path, figure: Callable[[str], None]) -> None:
    crops.make(tmp_path / "crops", 400)
    main(["finetune", "--config", "demo_finetune", "--out", str(tmp_path / "run"), "--data.source", "folder",
          "--data.root", str(tmp_path / "crops/folder"), "--data.exif", "true", "--data.train_images", "null",
          "--data.img_size", "56", "--trainer.epochs", "12", "--trainer.global_batch", "16", "--optim.lr", "3e-3",
          "--label_smoothing", "0.0", "--sparse.pattern", "4:32"])  # fmt: skip
    main(["pack", str(tmp_path / "run"), str(tmp_path / "small.safetensors")])
    main(["web", str(tmp_path / "small.safetensors"), str(tmp_path / "site")])
    kinds(tmp_path / "crops/folder", tmp_path / "site/photographs")
    (tmp_path / "site/photographs/large and no image.jpg").write_bytes(os.urandom(40_000_000))
    result, asked = browse(tmp_path / "site", tmp_path / "profile")
    predictor = load(tmp_path / "small.safetensors")
    errors, sure, spreads = [], 0, []
    for one in result["found"]:
        file = tmp_path / "site/photographs" / one["name"]
        if file.name.startswith("large"):
            assert one["error"] == "not an image that this browser can read"
            assert f"{file.name}: {one['error']}" in result["shown"]
            continue
        (best,) = predictor.predict(file, 1)
        image = predictor.prepare(as_rgb(file, predictor.card.input))
        (wanted,) = predictor(image[None])
        errors.append(np.abs(np.array(one["logits"]) - wanted).max())
        spreads.append(wanted.std())
        assert (one["best"][0]["label"], len(one["best"])) == (best[0].label, 5)
        sure += best[0].probability > 0.5
    assert len(errors) == 20
    assert sure > 10
    assert max(errors) < 1e-2 * float(np.mean(spreads))
    assert re.match(r"8 classes, 0\.\d MB", result["said"])
    here = result["asked"][0].rpartition("/")[0].partition("/photographs")[0]
    assert all(address.startswith((here, "blob:")) for address in result["asked"])
    assert "/model.safetensors" in asked
    milliseconds = sorted(one["ms"] for one in result["found"] if "ms" in one)[10]
    figure(
        f"20 photographs, {sure} with a probability over 0.5; largest difference of a logit {max(errors):.1e}, "
        f"spread {np.mean(spreads):.2f}; median {milliseconds:.0f} ms"
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@needs_modules
def test_a_damaged_model_is_one_line_on_the_page(tmp_path: Path) -> None:
    write(tmp_path / "model", reference.random_model(reference.TINY))
    main(["web", str(tmp_path / "model"), str(tmp_path / "site")])
    (tmp_path / "site/model.safetensors").write_bytes((tmp_path / "model").read_bytes()[:-100])
    (tmp_path / "site/photographs").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "site/photographs/photo.png")
    result, _ = browse(tmp_path / "site", tmp_path / "profile")
    assert re.search(
        "the model cannot be used: wanted a packed model, .*: wanted a tensor inside the file", result["said"]
    )
    assert result["shown"][0].startswith("photo.png: wanted a packed model")


def test_the_page_asks_for_nothing_elsewhere() -> None:
    for file in PAGE.glob("*.*"):
        if file.suffix != ".wasm":
            assert not re.search(r"https?:|//\w", re.sub(r"^\s*//.*|// .*$", "", file.read_text(), flags=re.MULTILINE))
    page = (PAGE / "index.html").read_text()
    for wanted in ("default-src 'self'", 'name="viewport"', 'lang="en"', "<label", "aria-live"):
        assert wanted in page


def test_without_modules_one_line_says_how_to_build_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model", reference.random_model(reference.TINY))
    monkeypatch.setattr("sparsemae.commands.web.PAGE", tmp_path)
    with pytest.raises(SystemExit):
        main(["web", str(tmp_path / "model"), str(tmp_path / "site")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "make wasm builds them" in line
    assert not (tmp_path / "site").exists()
    assert re.search(r"^wasm:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@needs_modules
def test_a_run_folder_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["web", str(tmp_path), str(tmp_path / "site")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{tmp_path}: wanted a packed model, as sparsemae pack makes one of a run, got a folder")
