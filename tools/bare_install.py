"""How large the bare install is, and how long its import takes: `make bare-install`.

    python tools/bare_install.py docs/bare-install.json

Wheels of sparsemae and of what it depends on go into an empty environment; the sizes are of the files there, the times
the medians of fresh processes, less what Python itself takes: processor time, which other work on the machine disturbs
little.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = 15
IMPORTS = {"numpy": "import numpy", "PIL": "import PIL.Image", "sparsemae.runtime": "import sparsemae.runtime"}


def installed(folder: Path, *wheels: str) -> Path:
    """An environment without pip that has the packages of some wheels; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), *wheels], check=True)
    return python


def sizes(python: Path) -> dict[str, float]:
    """MB of each package's files, its metadata included."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    found: dict[str, float] = {}
    for file in site.rglob("*"):
        if file.is_file():
            name = file.relative_to(site).parts[0].partition("-")[0].partition(".")[0].lower()
            name = "pillow" if name == "pil" else name
            found[name] = found.get(name, 0.0) + file.stat().st_size / 1e6
    return found


def seconds(python: Path, code: str) -> float:
    """Processor time of one fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    before = os.times()
    subprocess.run([python, "-c", code], check=True, env=environment, cwd="/")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure, and write the figures to the file named."""
    with tempfile.TemporaryDirectory() as folder:
        python = installed(Path(folder) / "env", str(ROOT))
        found = sizes(python)
        for code in IMPORTS.values():
            seconds(python, code)  # compiles
        turns = [{name: seconds(python, code) for name, code in {"": "", **IMPORTS}.items()} for _ in range(RUNS)]
    medians = {name: statistics.median(turn[name] - turn[""] for turn in turns) for name in IMPORTS}
    load = os.getloadavg()[0]
    document = {"megabytes": found, "import_seconds": medians, "load": load, "processors": os.cpu_count()}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
