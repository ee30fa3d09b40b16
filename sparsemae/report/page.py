"""`sparsemae report`: one HTML page of one or more runs, with nothing outside it: curves, moving masks, settings.

It reads the run folders only (metrics.jsonl, topology.jsonl, config.yaml, environment.json), so that a page can be made
while a run goes on, and runs are laid over one another whatever made them.
"""

import html
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsemae.files import write_atomic
from sparsemae.options import ReportConfig
from sparsemae.training.config import flatten_config

WHERE = {"step", "epoch"}
LINE = {"loss", "lr", "images_per_second", "standard_error"}
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222 }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto } .curves { display: flex; flex-wrap: wrap }
table { border-collapse: collapse; font-size: 13px } td, th { text-align: left; padding: .15em .8em .15em 0;
border-bottom: 1px solid #ddd; vertical-align: top } caption { text-align: left; font-weight: bold; padding: .5em 0 }"""


@dataclass(frozen=True)
class _Run:
    name: str
    metrics: list[dict[str, Any]]
    topology: list[dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]


def report(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises ValueError naming a folder that holds no run."""
    runs = [_read(Path(folder)) for folder in config.runs]
    out = Path(config.out) if config.out else Path(config.runs[0]) / "report.html"
    named = ", ".join(run.name for run in runs)
    found = sorted({key for run in runs for row in run.metrics for key in row} - WHERE - LINE)
    curves = [_curve(runs, name, lambda run: run.metrics) for name in ("loss", "lr", *found, "images_per_second")]
    curves += [_curve(runs, name, _totals) for name in ("flip_rate", "sad")]
    layers = [_layers(run) for run in runs if run.topology]
    settings = _table("Settings" if len(runs) == 1 else "Settings that differ", runs, lambda run: run.settings)
    machine = _table("Machine", runs, lambda run: run.environment)
    write_atomic(
        out,
        f"<!doctype html><meta charset=utf-8><title>{html.escape(named)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(named)}</h1><div class=curves>{''.join(curves)}</div>{''.join(layers)}{settings}{machine}\n",
    )
    print(f"wrote {out}")
    return out


def _read(folder: Path) -> _Run:
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: wanted the folder of a run, got one without metrics.jsonl")
    topology, environment = folder / "topology.jsonl", folder / "environment.json"
    return _Run(
        str(folder),
        _lines(folder / "metrics.jsonl"),
        _lines(topology) if topology.is_file() else [],
        flatten_config(yaml.safe_load((folder / "config.yaml").read_text())),
        flatten_config(json.loads(environment.read_text())),
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Records of a run's file; the last line may be torn where the run goes on."""
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _totals(run: _Run) -> list[dict[str, Any]]:
    return [{"epoch": row["epoch"], **row["total"]} for row in run.topology]


def _curve(runs: Iterable[_Run], name: str, records_of: Callable[[_Run], list[dict[str, Any]]]) -> str:
    """One quantity over the epochs, a line per run; nothing if no run has it."""
    figure = Figure(figsize=(4.6, 3.0))
    axes = figure.subplots()
    for run in runs:
        points = [(row["epoch"], row[name]) for row in records_of(run) if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=run.name, linewidth=1.2, marker="." if len(points) < 40 else "")
    if not axes.lines:
        return ""
    axes.set(title=name.replace("_", " "), xlabel="epoch")
    if name == "flip_rate":
        axes.set_yscale("log")
    if len(axes.lines) > 1:
        axes.legend(fontsize=7)
    return _drawn(figure, axes)


def _layers(run: _Run) -> str:
    """Flip rate of every layer over the epochs, as an image: where and when the mask still moves."""
    names = list(run.topology[-1]["layers"])
    rates = [[row["layers"][name]["flip_rate"] for row in run.topology] for name in names]
    figure = Figure(figsize=(9.2, 1.2 + 0.14 * len(names)))
    axes = figure.subplots()
    first, last = run.topology[0]["epoch"], run.topology[-1]["epoch"]
    extent = (first, max(last, first + 1e-3), len(names) - 0.5, -0.5)
    image = axes.imshow(rates, aspect="auto", extent=extent)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set(title=f"{run.name}: fraction of the mask that moved since the last epoch", xlabel="epoch")
    figure.colorbar(image)
    return _drawn(figure, axes)


def _drawn(figure: Figure, axes: Axes) -> str:
    axes.title.set_fontsize(10)
    figure.tight_layout()
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    _, tag, drawing = stream.getvalue().partition("<svg")  # without the XML prologue
    return f"<figure>{tag}{drawing}</figure>"


def _table(title: str, runs: list[_Run], values_of: Callable[[_Run], dict[str, Any]]) -> str:
    """A row per key, a column per run; of several runs only the rows that differ."""
    keys = dict.fromkeys(key for run in runs for key in values_of(run))
    rows = []
    for key in keys:
        values = [str(values_of(run).get(key, "")) for run in runs]
        if len(runs) == 1 or len(set(values)) > 1:
            rows.append("<tr><td>" + "<td>".join(html.escape(cell) for cell in (key, *values)))
    head = "<tr><th>" + "".join(f"<th>{html.escape(run.name)}" for run in runs)
    return f"<table><caption>{title}</caption>{head}{''.join(rows)}</table>"
