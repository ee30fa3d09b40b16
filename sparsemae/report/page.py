"""`sparsemae report`: one HTML page of one or more runs, with nothing outside it: curves, moving masks, settings.

It reads the run folders only (metrics.jsonl, topology.jsonl, config.yaml, environment.json), so that a page can be made
while a run goes on, and runs are laid over one another whatever made them.
"""

import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsemae.files import write_atomic
from sparsemae.options import ReportConfig
from sparsemae.plain_yaml import read_yaml
from sparsemae.terminal import printable
from sparsemae.training.config import flatten_config

WHERE = {"step", "epoch"}
LINE = {"loss", "lr", "images_per_second", "standard_error"}
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222 }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto } .curves { display: flex; flex-wrap: wrap }
table { border-collapse: collapse; font-size: 13px } td, th { text-align: left; padding: .15em .8em .15em 0;
border-bottom: 1px solid #ddd; vertical-align: top } caption { text-align: left; font-weight: bold; padding: .5em 0 }"""


def report(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises ValueError naming a folder that holds no run, or a malformed one."""
    runs = {folder: Path(folder) for folder in config.runs}
    for folder, run in runs.items():
        if not (run / "metrics.jsonl").is_file():
            raise ValueError(f"{folder}: wanted the folder of a run, got one without metrics.jsonl")
    out = Path(config.out or runs[config.runs[0]] / "report.html")
    try:
        page = _page(runs)
    except Exception as error:  # its files may hold anything, deeply nested
        said = " ".join(str(error).split()) or type(error).__name__
        names = ", ".join(runs)
        raise ValueError(f"{names}: wanted the files of a run, got some that are malformed: {said}") from error
    write_atomic(out, page)
    print(printable(f"wrote {out}"))
    return out


def _page(runs: Mapping[str, Path]) -> str:
    metrics = {name: _lines(run / "metrics.jsonl") for name, run in runs.items()}
    topology = {name: _lines(run / "topology.jsonl") for name, run in runs.items()}
    totals = {name: [{**row, **row["total"]} for row in rows] for name, rows in topology.items()}
    settings = {name: flatten_config(read_yaml(run / "config.yaml")) for name, run in runs.items()}
    machine = {name: flatten_config(json.loads((run / "environment.json").read_text())) for name, run in runs.items()}
    named = html.escape(", ".join(runs))
    found = sorted({key for rows in metrics.values() for row in rows for key in row} - WHERE - LINE)
    curves = [_curve(metrics, name) for name in ("loss", "lr", *found, "images_per_second")]
    curves += [_curve(totals, name) for name in ("flip_rate", "sad")]
    layers = [_layers(name, rows) for name, rows in topology.items() if rows]
    tables = _table("Settings" if len(runs) == 1 else "Settings that differ", settings) + _table("Machine", machine)
    return (
        f"<!doctype html><meta charset=utf-8><title>{named}</title><style>{STYLE}</style><h1>{named}</h1>"
        f"<div class=curves>{''.join(curves)}</div>{''.join(layers)}{tables}\n"
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Records of a run's file, none without it; the last line may be torn where the run goes on."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _curve(records: Mapping[str, list[dict[str, Any]]], name: str) -> str:
    """One quantity over the epochs, a line per run; nothing if no run has it."""
    figure = Figure(figsize=(4.6, 3.0), layout="tight")
    axes = figure.subplots()
    for run, rows in records.items():
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=run, linewidth=1.2, marker="." if len(points) < 40 else "")
    if not axes.lines:
        return ""
    axes.set_title(name.replace("_", " "), fontsize=10)
    axes.set(xlabel="epoch", yscale="log" if name == "flip_rate" else "linear")
    if len(axes.lines) > 1:
        axes.legend(fontsize=7)
    return _drawn(figure)


def _layers(run: str, rows: list[dict[str, Any]]) -> str:
    """Flip rate of every layer over the epochs, as an image: where and when the mask still moves."""
    names, first, last = list(rows[-1]["layers"]), rows[0]["epoch"], rows[-1]["epoch"]
    figure = Figure(figsize=(9.2, 1.2 + 0.14 * len(names)), layout="tight")
    axes = figure.subplots()
    image = axes.imshow(
        [[row["layers"][name]["flip_rate"] for row in rows] for name in names],
        aspect="auto", extent=(first, max(last, first + 1e-3), len(names) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_title(f"{run}: fraction of the mask that moved since the last epoch", fontsize=10)
    axes.set_xlabel("epoch")
    figure.colorbar(image)
    return _drawn(figure)


def _drawn(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    _, tag, drawing = stream.getvalue().partition("<svg")  # without the XML prologue
    return f"<figure>{tag}{drawing}</figure>"


def _table(title: str, columns: Mapping[str, dict[str, Any]]) -> str:
    """A row per key, a column per run; of several runs only the rows that differ."""
    rows = ["<tr><th>" + "".join(f"<th>{html.escape(name)}" for name in columns)]
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        cells = [str(values.get(key, "")) for values in columns.values()]
        if len(columns) == 1 or len(set(cells)) > 1:
            rows.append("<tr><td>" + "<td>".join(html.escape(cell) for cell in (key, *cells)))
    return f"<table><caption>{title}</caption>{''.join(rows)}</table>"
