"""`sparsemae report`: one HTML page of a run, or of several laid over one another, with nothing outside it.

It reads the run folders' files only, so that a page can be made while a run goes on, of a run of an earlier version,
and without torch: the logs, and, once the run has ended, report.json (see `collect`). The page has no script, and
forbids itself every request.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.files import existing, write_atomic
from sparsemae.limits import flatten
from sparsemae.options import ReportConfig
from sparsemae.plain_yaml import read_mapping
from sparsemae.report.charts import heat_map, line_chart
from sparsemae.report.markup import details, escaped, pictures, section, table
from sparsemae.report.tables import MATRIX_CLASSES, class_table, confusion_table, layer_table, settings_table
from sparsemae.terminal import printable

PAGE, RECORD, PREDICTIONS = "report.html", "report.json", "predictions.csv"
RESULT = "result.json"
"""What `commands.result` says of a finished training: which epoch is kept, the test split's figures, notes."""
STYLE = Path(__file__).parent / "page.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SCORES = {  # metrics that are fractions, by chart
    "Validation accuracy": {"top1": "top-1", "top5": "top-5"},
    "Validation scores": {"miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"},
}
LABELS = {key: label for chart in SCORES.values() for key, label in chart.items()}
NO_CURVE = {"step", "epoch", "loss", "lr", "images_per_second", "standard_error", "scored_classes", "classes"}
LOSS = "Mean over the steps between two lines of the log, of the images as they are augmented."
FLIPS = (
    "The fraction of the mask's entries that changed since the last epoch. It should fall as the network settles on "
    "its weights; where it stays high to the end, the learning rate keeps the mask from settling."
)
SAD = (
    "Sparse architecture divergence: how many entries of the mask differ from the one at the start. It grows while "
    "other weights are tried, and levels off when the network is found; 0 is a mask that never moved."
)
LAYERS = "The fraction of each layer's mask that changed since the last epoch: where the network still searches."
CLASSES = "Precision: of what was predicted as the class, how much is. Recall: of the class, how much was found."
Rows = list[dict[str, Any]]


def report(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises ValueError naming a folder that holds no run."""
    folders = [Path(folder) for folder in config.runs]
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{folder}: wanted the folder of a run, got one without metrics.jsonl")
    out = write_page(folders, config.out)
    print(printable(f"wrote {out}"))
    return out


def write_page(folders: Sequence[Path], out: str | Path | None = None) -> Path:
    """The page of one run, or of several; where nothing is said, in the folder of the first. Returns its path.

    Raises ValueError naming a file of a run that cannot be read.
    """
    runs: dict[str, _Run] = {}
    for folder in folders:
        try:
            runs[str(folder)] = _Run(folder)
            body = _one(runs[str(folder)])
        except Exception as error:  # they may hold anything
            why = f"{error}" if isinstance(error, ValueError | OSError) else f"{error!r}"
            raise ValueError(f"{folder}: wanted the files of a run: {why:.200}") from error
    if len(folders) > 1:
        body = _comparison(runs)
    title = escaped(", ".join(folder.name for folder in folders))
    path = Path(out or folders[0] / PAGE)
    write_atomic(
        path,
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><meta name=color-scheme content="light dark">'
        f'<link rel=icon href="data:,"><title>{title}</title><style>{STYLE.read_text()}</style>'
        f"<main>{body}</main></html>\n",
    )
    return path


class _Run:
    """What a run's folder says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.topology = read_lines(folder / "metrics.jsonl"), read_lines(folder / "topology.jsonl")
        self.settings = flatten(read_mapping(folder / "config.yaml"))
        self.machine = flatten(json.loads(existing(folder / "environment.json").read_text()))
        self.record, self.result = (
            json.loads((folder / name).read_text()) if (folder / name).is_file() else {} for name in (RECORD, RESULT)
        )
        if self.metrics and self.record.get("step", self.metrics[-1]["step"]) != self.metrics[-1]["step"]:
            self.record, self.result = {}, {}  # the run has gone on since

    def points(self, name: str) -> list[tuple[float, float]]:
        """One quantity over the epochs."""
        return [(row["epoch"], row[name]) for row in self.metrics if row.get(name) is not None]

    def moved(self, name: str) -> list[tuple[float, float]]:
        """One measure of the mask's movement over the epochs."""
        return [(row["epoch"], row["total"][name]) for row in self.topology]


def _one(run: _Run) -> str:
    record, settings = run.record, run.settings
    names = record.get("class_names", [])
    confusion = np.zeros((len(names), len(names)), np.int64)
    for truth, predicted, count in record.get("confusion", ()):
        confusion[truth, predicted] = count
    unit, about = record.get("unit", ""), "Pairs of classes, of all images."
    matrix = classes = ""
    if confusion.any():
        matrix = confusion_table(confusion, names, unit)
        classes = class_table(confusion, names, unit, record.get("palette"))
        counted = f"{confusion.sum():,} {unit}" + f" of {record['images']:,} images" * (unit == "pixels")
        about = f"{counted}; shaded by their fraction of a row." if len(names) <= MATRIX_CLASSES else about
    pattern, model = settings.get("sparse.pattern"), settings.get("model.name")
    args = [f"{name[11:]} {value}" for name, value in settings.items() if name.startswith("model.args.")]
    facts = [
        record.get("title", ""), f"{model} ({', '.join(args)})" if args else model,
        f"{pattern} sparse" if pattern != "dense" else "dense",
        f"epoch {run.metrics[-1]['epoch']:g}" if run.metrics else "",
    ]  # fmt: skip
    return "".join(
        [
            f"<header><p class=kicker>sparsemae</p><h1>{escaped(run.folder.name)}</h1>",
            f"<p class=facts>{' · '.join(escaped(fact) for fact in facts if fact)}</p></header>",
            _headlines(run),
            "".join(f"<p class={_kind(note)}>{escaped(note)}</p>" for note in _notes(run)),
            section("Curves", _grid(_curves(run))),
            section("Confusion matrix" if len(names) <= MATRIX_CLASSES else "Most confused", matrix, about),
            section("Classes", classes, CLASSES),
            *(section(one["title"], pictures(one["pictures"]), one["about"]) for one in record.get("galleries", ())),
            section("How the mask moved", _movement({"": run}) + _heat(run)),
            section(
                "The first batch as the model saw it", pictures(record.get("batch", ())),
                "Training images after augmentation.",
            ),
            section("Details", _details({str(run.folder): run}) + _layers(record)),
        ]
    )  # fmt: skip


def _comparison(runs: Mapping[str, _Run]) -> str:
    """Several runs: their curves over one another, and the settings that differ."""
    names = list(dict.fromkeys(key for run in runs.values() for row in run.metrics for key in row))
    found = [name for name in names if name not in NO_CURVE]
    labels = {"loss": "Training loss", "lr": "Learning rate"} | LABELS
    charts = [
        line_chart(
            labels.get(name, name.replace("_", " ")), "%" if name in LABELS else "",
            {title: run.points(name) for title, run in runs.items()},
        )
        for name in ("loss", *found, "lr")
    ]  # fmt: skip
    best = []
    for title, run in runs.items():
        for headline in run.record.get("headlines", ())[:1]:
            best.append((escaped(title), escaped(headline["name"]), *_value(headline)))
    return "".join(
        [
            f"<header><p class=kicker>sparsemae</p><h1>{len(runs)} runs</h1></header>",
            section("Figures", table(("run", "figure", "value", "± standard error"), best, 2) if best else ""),
            section("Curves", _grid(charts)),
            section("How the masks moved", _movement(runs)),
            section("Details", _details(runs), "Pictures, classes and layers are in each run's own report."),
        ]
    )


def _headlines(run: _Run) -> str:
    found: list[Any] = list(run.record.get("headlines", ()))
    if test := run.result.get("test"):
        key = next((key for key in LABELS if key in test), "")
        about = "on the split test, measured once"
        tested = {"name": f"Test {LABELS.get(key, key)}", "value": test.get(key), "error": test.get("standard_error")}
        found = [tested | {"unit": "%", "about": about}, *found] if key else found
    if not found:  # it goes on, or has no evaluation
        for key, label in ({"loss": "Training loss"} | LABELS).items():
            for epoch, value in run.points(key)[-1:]:
                unit = "" if key == "loss" else "%"
                found.append({"name": label, "value": value, "error": None, "unit": unit, "about": f"epoch {epoch:g}"})
    cards = []
    for headline in found:
        figure, error = _value(headline)
        spread = f" <small>± {error}</small>" if error else ""
        about = f"<p>{escaped(headline['about'])}</p>" if headline["about"] else ""
        cards.append(f"<li><h3>{escaped(headline['name'])}</h3><b>{figure}</b>{spread}{about}</li>")
    images = run.record.get("images")
    said = f"<p class=about>± is one standard error, over {images:,} validation images.</p>" if images else ""
    return f"<ul class=headlines>{''.join(cards)}</ul>{said}" if cards else ""


def _value(headline: Mapping[str, Any]) -> tuple[str, str]:
    value, error, percent = headline["value"], headline["error"], headline["unit"] == "%"
    written = [f"{100 * x:.1f}" if percent else f"{x:.3f}" for x in (value, error) if x is not None]
    unit = " %" if percent else f" {escaped(headline['unit'])}".rstrip()
    return f"{written[0]}<small>{unit}</small>", written[1] if len(written) > 1 else ""


def _notes(run: _Run) -> list[str]:
    """How the figures came about, warnings first; and what is missing of a run without a record."""
    if run.record:
        return list(run.result.get("notes", ()))
    return [
        "The run has not ended, or is of an earlier version: its folder has logs, but no report.json, from which "
        "classes and pictures are shown."
    ]


def _kind(note: str) -> str:
    return "warning" if note.startswith("warning") else "note"


def _curves(run: _Run) -> list[str]:
    charts = [line_chart("Training loss", "", {"loss": run.points("loss")}, LOSS)]
    shown, kept = set(NO_CURVE), run.result.get("kept")
    for title, names in SCORES.items():
        kinds = names | {f"raw_{name}": f"{label}, without average" for name, label in names.items()}
        lines = {label: points for name, label in kinds.items() if (points := run.points(name))}
        errors = [error for _, error in run.points("standard_error")] if len(lines) == 1 else None
        about = f"Written are the weights of epoch {kept:g}." if kept is not None and lines else ""
        charts.append(line_chart(title, "%", lines, about, errors=errors, mark=kept))
        shown |= kinds.keys()
    others = dict.fromkeys(key for row in run.metrics for key in row if key not in shown and key[:4] != "raw_")
    charts += [line_chart(name.replace("_", " "), "", {name: run.points(name)}) for name in others]
    charts.append(line_chart("Learning rate", "", {"lr": run.points("lr")}))
    return charts


def _movement(runs: Mapping[str, _Run]) -> str:
    charts = [
        line_chart(
            "Flip rate", "fraction", {name: run.moved("flip_rate") for name, run in runs.items()}, FLIPS, log=True
        ),
        line_chart("SAD", "entries", {name: run.moved("sad") for name, run in runs.items()}, SAD),
    ]
    return _grid(charts)


def _grid(charts: Sequence[str]) -> str:
    return f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""


def _heat(run: _Run) -> str:
    if len(run.topology) < 2:
        return ""
    names = {name.removeprefix("encoder."): name for name in run.topology[-1]["layers"]}
    rates = {label: [row["layers"][name]["flip_rate"] for row in run.topology] for label, name in names.items()}
    epochs = run.topology[0]["epoch"], run.topology[-1]["epoch"]
    return heat_map("Flip rate by layer", "fraction, shaded by its logarithm", rates, epochs, LAYERS)


def _details(runs: Mapping[str, _Run]) -> str:
    return details(
        "Settings" if len(runs) == 1 else "Settings that differ",
        settings_table({name: run.settings for name, run in runs.items()}),
    ) + details(
        "Machine and speed",
        settings_table({name: run.machine for name, run in runs.items()})
        + _grid(
            [
                line_chart(
                    "Speed", "images per second", {name: r.points("images_per_second") for name, r in runs.items()}
                )
            ]
        ),
    )


def _layers(record: Mapping[str, Any]) -> str:
    return details("What is sparse", layer_table(record["layers"])) if "layers" in record else ""


def read_lines(file: Path) -> Rows:
    """Records of a run's file, none without it; the last line may be torn where the run goes on."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
