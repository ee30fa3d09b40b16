"""The page of `sparsemae web` beside onnxruntime-web, in one headless Chromium, and in Node: `make browser`.

    python tools/browser.py FOLDER docs/browser.json

FOLDER has onnxruntime-web from npm in node_modules. Ours is SparseMAE-T (random weights, 224², bf16), one photograph
through the page's own worker, on its one thread; theirs a dense ViT-B in int8 (dynamic), on one thread and on all. In
Node both modules take bf16 and int8 files, in turns with the rival, each on one thread.
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

import numpy as np
from PIL import Image

from sparsemae.benchmark.packed import DENSE, _export, _random_files
from sparsemae.commands.web import web
from sparsemae.options import WebConfig

ROOT = Path(__file__).parents[1]
RUNS = 9
ROUNDS = 3
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

NODE_RIVAL = """import ort from "FOLDER/onnxruntime-web/dist/ort.node.min.mjs";
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create("dense.onnx", { executionProviders: ["wasm"] });
const image = new ort.Tensor("float32", new Float32Array(3 * 224 * 224).fill(0.5), [1, 3, 224, 224]);
const times = [];
for (let i = 0; i < RUNS; ++i) {
  const start = performance.now();
  await session.run({ [session.inputNames[0]]: image });
  times.push(performance.now() - start);
}
process.stderr.write(`${JSON.stringify(times)}\\n`);
""".replace("RUNS", str(RUNS // ROUNDS + 1))


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


def in_node(files: dict[str, str], site: Path, modules: Path, version: str) -> dict[str, float]:
    """Milliseconds in Node, one thread each: ours by module and file, and the rival; medians, in turns."""
    (site / "rival.mjs").write_text(NODE_RIVAL.replace("FOLDER", str(modules)))
    np.full((1, 3, 224, 224), 0.5, np.float32).tofile(site / "images")
    node = ["node", "--no-warnings", "--experimental-wasm-relaxed-simd"]
    runs = str(RUNS // ROUNDS + 1)
    subjects = {
        f"SparseMAE-T {dtype}, {module}": [
            *node, str(ROOT / "tests/native/forward.mjs"), f"{module}.wasm", file, "images", "1", runs
        ]
        for dtype, file in files.items()
        for module in ("sparsemae", "sparsemae-relaxed")
    }  # fmt: skip
    subjects[f"onnxruntime-web {version}, dense ViT-B int8"] = [*node, "rival.mjs"]
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, command in subjects.items():
            done = subprocess.run(command, cwd=site, capture_output=True, check=True)
            times[name] += json.loads(done.stderr.splitlines()[-1])[1:]
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure, and write the figures to the file named."""
    modules = Path(sys.argv[1]).resolve() / "node_modules"
    package = json.loads((modules / "onnxruntime-web/package.json").read_text())
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, site = Path(temporary), Path(temporary) / "site"
        small = [file for file in _random_files(folder) if "T" in Path(file).name]
        files = {dtype: next(file for file in small if dtype in file) for dtype in ("bf16", "int8")}
        web(WebConfig(files["bf16"], str(site)))
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
        node = in_node(files, site, modules, package["version"])
    version = subprocess.run(["chromium", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    document = {
        "milliseconds": found, "node_milliseconds": node, "megabytes": [one / 1e6 for one in size],
        "browser": f"Chromium {version}",
        "load": os.getloadavg()[0], "processors": threads,
    }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
