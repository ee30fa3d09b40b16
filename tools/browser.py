"""The page of `sparsemae web` beside onnxruntime-web, in one headless Chromium: `make browser`.

    python tools/browser.py FOLDER docs/browser.json

FOLDER has onnxruntime-web from npm in node_modules. Ours is SparseMAE-T (random weights, 224², bf16), one photograph
through the page's own worker, on its one thread; theirs a dense ViT-B in int8 (dynamic), on one thread and on all.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from sparsemae.benchmark.packed import DENSE, _export, _random_files
from sparsemae.commands.web import web
from sparsemae.options import WebConfig

RUNS = 9
SECONDS = 900
PAGE = """<!doctype html><script type="module">
const answer = (body) => fetch("result", { method: "POST", body: JSON.stringify(body) });
try {
  const rounds = [];
  const name = location.hash.slice(1);
  if (name === "ours") {
    const file = new File([await (await fetch("photo.jpg")).blob()], "photo.jpg", { type: "image/jpeg" });
    const worker = new Worker("worker.js", { type: "module" });
    for (let id = 0; id < RUNS + 1; ++id) {
      rounds.push(await new Promise((done, failed) => {
        worker.onmessage = ({ data }) => data.id === id && (data.error ? failed(Error(data.error)) : done(data.ms));
        worker.postMessage({ id, file });
      }));
    }
  } else {
    const ort = await import("/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs");
    ort.env.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
    ort.env.wasm.numThreads = +name;
    const session = await ort.InferenceSession.create("dense.onnx", { executionProviders: ["wasm"] });
    const image = new ort.Tensor("float32", new Float32Array(3 * 224 * 224).fill(0.5), [1, 3, 224, 224]);
    for (let i = 0; i < RUNS + 1; ++i) {
      const start = performance.now();
      await session.run({ [session.inputNames[0]]: image });
      rounds.push(performance.now() - start);
    }
  }
  await answer({ rounds: rounds.slice(1), isolated: crossOriginIsolated });
} catch (error) {
  await answer({ error: `${error}` });
}
</script>""".replace("RUNS", str(RUNS))


class _Handler(SimpleHTTPRequestHandler):
    """Serves files as a page with threads wants them, and takes one answer."""

    results: dict[str, Any]
    done: threading.Event

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_POST(self) -> None:
        type(self).results = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.done.set()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def visit(site: Path, what: str) -> list[float]:
    """Milliseconds of the runs of one subject, in a browser of its own. Raises RuntimeError on what the page says."""
    handler: Any = type("Handler", (_Handler,), {"done": threading.Event(), "results": {}})
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site))) as server,
        tempfile.TemporaryDirectory() as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/rival.html#{what}"
        browser = subprocess.Popen(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
             "--disable-background-networking", "--no-first-run", address],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            if not handler.done.wait(SECONDS):
                raise RuntimeError(f"{what}: no answer in {SECONDS} s")
        finally:
            os.killpg(browser.pid, 9)
            browser.wait()
            server.shutdown()
    if "error" in handler.results:
        raise RuntimeError(f"{what}: {handler.results['error']}")
    rounds: list[float] = handler.results["rounds"]
    return rounds


def main() -> None:
    """Measure, and write the figures to the file named."""
    modules = Path(sys.argv[1]).resolve() / "node_modules"
    package = json.loads((modules / "onnxruntime-web/package.json").read_text())
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, site = Path(temporary), Path(temporary) / "site"
        ours = next(file for file in _random_files(folder) if "T" in Path(file).name and "bf16" in file)
        web(WebConfig(ours, str(site)))
        _export("onnxruntime int8", DENSE["B"], str(folder), threads)
        (dense,) = folder.glob("*onnxruntime int8.onnx")
        shutil.move(dense, site / "dense.onnx")
        (site / "node_modules").symlink_to(modules)
        (site / "rival.html").write_text(PAGE)
        Image.effect_noise((500, 375), 60).convert("RGB").save(site / "photo.jpg")
        size = (site / "model.safetensors").stat().st_size, (site / "dense.onnx").stat().st_size
        subjects = {"SparseMAE-T bf16, the page": "ours"} | {
            f"onnxruntime-web {package['version']}, dense ViT-B int8, {n} thread{'s' * (n > 1)}": str(n)
            for n in sorted({1, threads})
        }
        found = {name: statistics.median(visit(site, what)) for name, what in subjects.items()}
    version = subprocess.run(["chromium", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    document = {
        "milliseconds": found, "megabytes": [one / 1e6 for one in size], "browser": f"Chromium {version}",
        "load": os.getloadavg()[0], "processors": threads,
    }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
