"""The tasks: what a model can be trained for, one file each. A new one is an entry here and one in `jobs.JOBS`."""

from typing import TYPE_CHECKING, Any

from sparsemae.jobs import resolve

if TYPE_CHECKING:
    from sparsemae.tasks.task import Task

TASKS: dict[str, Any] = {
    "pretrain": "sparsemae.tasks.pretraining:Pretraining",
    "classify": "sparsemae.tasks.classification:Classification",
    "segment": "sparsemae.tasks.segmentation:Segmentation",
}
"""By the name that options and model cards have for it: a `Task`, or where it lies."""


def task_class(name: str) -> "type[Task[Any]]":
    """Looks a task up; what a file names is never imported. Raises ValueError if there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"wanted a model for one of the tasks {', '.join(TASKS)}, got one for {name!r:.60}")
    found: type[Task[Any]] = resolve(TASKS[name])
    return found
