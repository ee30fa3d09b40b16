"""The end of a run: predictions.csv, report.json and report.html in its folder.

report.json is what the page shows beside the run's logs: figures, the confusion matrix, and its pictures, small, as
data URIs. So `sparsemae report` makes the page again at any time, without the images, the model or torch.
"""

import base64
import csv
import io
import json
from pathlib import PurePath
from typing import Any

import numpy as np

from sparsemae.data.draws import STEP
from sparsemae.data.loader import UnreadableImages, batches
from sparsemae.data.sampling import TrainingSampler, seed_all
from sparsemae.files import write_atomic
from sparsemae.report.page import PREDICTIONS, RECORD, read_lines, write_page
from sparsemae.sparsity import summarize
from sparsemae.tasks.outcomes import Outcomes, Shown
from sparsemae.tasks.task import Task
from sparsemae.training.logs import METRICS
from sparsemae.training.run import Run
from sparsemae.training.subject import Subject

BATCH = 16
"""Images of the first batch that are shown."""
LARGEST = (720, 320)
"""Of a picture, px."""
PIXEL_ART = 40
"""Side up to which a picture is kept to the pixel."""


def collect(run: Run, subject: Subject) -> None:
    """Write them; all processes call it, the first one writes.

    A trained model must not be lost for want of a page: what fails is said in the run's log.
    """
    task, model = subject.task, subject.model
    assert isinstance(task, Task)
    if task.outcomes is not None:
        task.outcomes.gather()
    if not run.fabric.is_global_zero:
        return
    try:
        seen = _first_batch(run, subject)
        model.eval()
        root = task.config.data.root
        found: dict[str, Any] = {
            "version": 1,
            "step": next((row["step"] for row in reversed(read_lines(run.folder / METRICS))), None),
            "title": task.title,
            "layers": vars(summarize(model)),
            "batch": [_encoded(shown, root) for shown in seen],
            "galleries": [
                {"title": one.title, "about": one.about, "pictures": [_encoded(shown, root) for shown in one.pictures]}
                for one in task.galleries(model)
            ],
        }
        if task.outcomes is not None:
            found |= _figures(task.outcomes)
            rows = io.StringIO(newline="")
            csv.writer(rows).writerows(task.outcomes.table())
            write_atomic(run.folder / PREDICTIONS, rows.getvalue().encode(errors="surrogateescape"))
        write_atomic(run.folder / RECORD, json.dumps(found))
        run.log.info(f"wrote {write_page([run.folder])}")
    except (ValueError, OSError, LookupError, TypeError) as error:  # its texts may hold anything
        run.log.info(f"warning: no report: {' '.join(str(error).split())}")


def _figures(outcomes: Outcomes) -> dict[str, Any]:
    confusion = outcomes.confusion()
    truth, predicted = confusion.nonzero()
    return {
        "images": len(outcomes.rows["index"]),
        "headlines": [headline._asdict() for headline in outcomes.headlines()],
        "unit": outcomes.unit,
        "class_names": outcomes.class_names,
        "palette": outcomes.palette,
        "confusion": np.stack([truth, predicted, confusion[truth, predicted]], axis=1).tolist(),
    }


def _first_batch(run: Run, subject: Subject) -> list[Shown]:
    """As the first process had it: a function of the seed."""
    dataset, plan = subject.dataset, subject.batches
    sampler = TrainingSampler(plan, run.seed, 0, 0, 1)
    batch = next(iter(batches(dataset, sampler, 0, unreadable=UnreadableImages(len(dataset), 1.0))))
    names = [dataset.source.filename(index) for index in batch["index"][:BATCH].tolist()]
    device_batch = run.fabric.to_device(batch)
    seed_all(run.seed, STEP, 0, plan.micro_batch_number(0, 0))
    seen = subject.task.seen(device_batch)[:BATCH]  # type: ignore[attr-defined]
    return [shown._replace(title=name) for shown, name in zip(seen, names, strict=True)]


def _encoded(shown: Shown, root: str | None) -> dict[str, Any]:
    image = shown.image
    image.thumbnail(LARGEST)
    stream = io.BytesIO()
    kind = "png" if max(image.size) <= PIXEL_ART else "webp"
    image.save(stream, kind, quality=75, method=2)
    return {
        "picture": f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}",
        "width": image.width,
        "wide": image.mode == "RGBA",  # several `beside` one another
        "file": shown.title,
        "title": _short(shown.title, root),
        "note": shown.note,
    }


def _short(file: str, root: str | None) -> str:
    """A file as a person names it: below the data set's root, or the end of its path."""
    path = PurePath(file)
    if root is not None and path.is_relative_to(root):
        return str(path.relative_to(root))
    return str(PurePath(*path.parts[-2:]))
