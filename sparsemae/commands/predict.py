"""Predictions for image files, by a packed file (without torch) or by a run's model, a segmenter's as pictures."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np

import sparsemae
from sparsemae.commands.overlays import Pictures
from sparsemae.data.images import as_rgb
from sparsemae.data.tree import image_files
from sparsemae.files import replacing
from sparsemae.options import PredictConfig
from sparsemae.predictor import Prediction
from sparsemae.terminal import printable

COLUMNS = ("file", "rank", "label", "index", "probability")
"""Of CSV: a row for each class of an image, the best has rank 1."""


def predict(config: PredictConfig) -> dict[str, Any]:
    """Write and return, per file, the ``top_k`` classes with their probabilities, or a segmenter's with their areas.

    Each is written as soon as it is known. Images that cannot be read are named on stderr and left out, as are a
    folder's other files by kind; in the end a ValueError counts those images.
    """
    files = list(_files(config))
    if config.null and "-" not in config.images:
        raise ValueError("null: wanted - among the images, for paths from standard input, got none")
    read = {path.resolve() for path in (Path(config.model), *files)}
    if config.out is not None and Path(config.out).resolve() in read:
        raise ValueError(f"out: wanted another file than what is read, got {config.out}")
    predictor = sparsemae.load(config.model)
    card, results, unreadable = predictor.card, dict[str, Any](), 0
    drawn = "palette" in card.settings
    if config.pictures is not None and not drawn:
        raise ValueError(f"pictures: wanted a segmenter, got {config.model}, which gives no masks")
    pictures = Pictures(card, files, Path(config.pictures or "predictions")) if drawn else None
    with _output(config) as write:
        for file, result in zip(files, predictor.stream(files, config.top_k, config.max_pixels), strict=True):
            if isinstance(result, ValueError):
                if len(files) == 1:
                    raise result
                unreadable += 1
                _warn(result)
                continue
            if pictures is not None:
                image = as_rgb(file, card.input, config.max_pixels)
                result = pictures.write(file, image, result)[: config.top_k]  # noqa: PLW2901
            results[str(file)] = result
            write(str(file), result)
    if config.out is not None:
        print(f"{printable(config.out)}: predictions of {len(files) - unreadable:,} images")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(files)} images could not be read; the others are done")
    return results


def _files(config: PredictConfig) -> Iterator[Path]:
    for path in config.images:
        if path == "-":
            names = sys.stdin.buffer.read().split(b"\0" if config.null else b"\n")
            yield from (Path(os.fsdecode(name)) for name in names if name)
        else:
            yield from image_files(Path(path), _warn)


def _warn(text: object) -> None:
    print(f"sparsemae predict: {printable(text)}", file=sys.stderr)


@contextmanager
def _output(config: PredictConfig) -> Iterator[Callable[[str, Any], None]]:
    """What writes the result of a file, to ``--out``, which appears in the end, or to stdout."""
    if config.out is not None:
        with (
            replacing(config.out) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            yield _writer(config.format, file, _exact)
    else:
        if config.format == "csv" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        yield _writer(config.format, sys.stdout, printable if sys.stdout.isatty() else _exact)


def _writer(style: str, file: TextIO, text: Callable[[str], str]) -> Callable[[str, Any], None]:
    """What writes a result in one of the formats; names in CSV and JSON are passed through ``text``."""
    rows: Any = SimpleNamespace(write=lambda row: file.write(row.removesuffix("\r\n") + "\n"))
    table = csv.writer(rows)  # of these ends of lines, which have it quote a carriage return
    if style == "csv":
        table.writerow(COLUMNS)

    def write(name: str, result: Any) -> None:
        if style == "text":
            file.write(printable(f"{name}: {_shown(result)}") + "\n")
        elif not _are_predictions(result):
            raise ValueError(f"format: wanted text, as the model gives no classes, got {style}")
        else:
            classes = [replace(best, label=text(best.label)) for best in result]
            if style == "csv":
                table.writerows([text(name), rank, *astuple(best)] for rank, best in enumerate(classes, 1))
            else:
                file.write(json.dumps({"file": text(name), "predictions": [asdict(best) for best in classes]}) + "\n")
        file.flush()

    return write


def _exact(text: str) -> str:
    return text


def _are_predictions(result: Any) -> bool:
    return isinstance(result, list) and all(isinstance(best, Prediction) for best in result)


def _shown(result: Any) -> str:
    if _are_predictions(result):
        return ", ".join(f"{best.label} {best.probability:.1%}" for best in result)
    return f"{result:.4g}" if isinstance(result, float | np.floating) else str(result)
