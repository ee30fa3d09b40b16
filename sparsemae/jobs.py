"""The commands: for each its function, its options, and the recipe taken when none is named.

Both are looked up when the command is chosen, so that ``--help`` loads no more than it shows.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Job(NamedTuple):
    """One command."""

    function: str | Callable[[Any], object]
    """Takes the options; or where it lies, as ``module:name``."""
    options: str | type
    """A dataclass; or where it lies. A `TrainingConfig` makes it a job that trains."""
    help: str
    recipe: str | None = None


TRAIN = "sparsemae.commands.train:train"
TASK_OPTIONS, COMMAND_OPTIONS = "sparsemae.options.tasks:", "sparsemae.options.commands:"
JOBS = {
    "demo": Job(
        "sparsemae.demo.command:demo", COMMAND_OPTIONS + "DemoConfig",
        "the whole chain on embedded real images, in minutes",
    ),
    "pretrain": Job(
        TRAIN, TASK_OPTIONS + "PretrainConfig", "sparse pretraining of a masked autoencoder", "demo_pretrain"
    ),
    "finetune": Job(TRAIN, TASK_OPTIONS + "FinetuneConfig", "sparse finetuning for classification", "demo_finetune"),
    "segment": Job(
        TRAIN, TASK_OPTIONS + "SegmentConfig", "sparse finetuning for semantic segmentation", "demo_segment"
    ),
    "evaluate": Job(
        "sparsemae.commands.evaluate:evaluate", COMMAND_OPTIONS + "EvaluateConfig",
        "accuracy or mIoU of a finetuned model",
    ),
    "pack": Job(
        "sparsemae.commands.pack:pack", COMMAND_OPTIONS + "PackConfig",
        "a finetuned model to one small file for any CPU",
    ),
    "check": Job(
        "sparsemae.commands.check:check", COMMAND_OPTIONS + "CheckConfig",
        "what in a data set would break or spoil a run",
    ),
    "plan": Job("sparsemae.costs.plan:plan", COMMAND_OPTIONS + "PlanConfig", "what a recipe costs, before it runs"),
    "predict": Job(
        "sparsemae.commands.predict:predict", COMMAND_OPTIONS + "PredictConfig",
        "classes of image files, or of their pixels",
    ),
    "report": Job(
        "sparsemae.report.page:report", COMMAND_OPTIONS + "ReportConfig", "one page of curves and masks of runs"
    ),
    "benchmark": Job(
        "sparsemae.benchmark.command:benchmark", COMMAND_OPTIONS + "BenchmarkConfig",
        "packed models or training, beside their rivals",
    ),
}  # fmt: skip


def resolve(reference: str | T) -> T:
    """What ``module:name`` names; anything else is itself."""
    return resolve_name(reference) if isinstance(reference, str) else reference


def training_jobs() -> dict[str, Any]:
    """The options of the jobs that train, by the job's name."""
    from sparsemae.options.tasks import TrainingConfig

    found = {name: resolve(job.options) for name, job in JOBS.items()}
    return {name: kind for name, kind in found.items() if issubclass(kind, TrainingConfig)}
