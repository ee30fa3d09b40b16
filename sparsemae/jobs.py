"""The commands: for each its function, its options, and the recipe taken when none is named.

The function is looked up when the command runs, so that ``--help`` does not load torch.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sparsemae import options


class Job(NamedTuple):
    """One command."""

    function: str | Callable[[Any], object]
    """Takes the options; or where it lies, as ``module:name``."""
    options: type[Any]
    """A dataclass. A `TrainingConfig` makes it a job that trains."""
    help: str
    recipe: str | None = None


TRAIN = "sparsemae.commands.train:train"
JOBS = {
    "demo": Job(
        "sparsemae.demo.command:demo", options.DemoConfig,
        "the whole chain on embedded real images, in minutes",
    ),
    "pretrain": Job(TRAIN, options.PretrainConfig, "sparse pretraining of a masked autoencoder", "demo_pretrain"),
    "finetune": Job(TRAIN, options.FinetuneConfig, "sparse finetuning for classification", "demo_finetune"),
    "segment": Job(TRAIN, options.SegmentConfig, "sparse finetuning for semantic segmentation", "demo_segment"),
    "evaluate": Job(
        "sparsemae.commands.evaluate:evaluate", options.EvaluateConfig,
        "accuracy or mIoU of a finetuned model",
    ),
    "pack": Job("sparsemae.commands.pack:pack", options.PackConfig, "a finetuned model to one small file for any CPU"),
    "export": Job(
        "sparsemae.commands.export:export", options.ExportConfig,
        "a trained model as timm, transformers or ONNX Runtime open it",
    ),
    "check": Job(
        "sparsemae.commands.check:check", options.CheckConfig,
        "what in a data set would break or spoil a run",
    ),
    "plan": Job("sparsemae.costs.plan:plan", options.PlanConfig, "what a recipe costs, before it runs"),
    "predict": Job(
        "sparsemae.commands.predict:predict", options.PredictConfig,
        "classes of image files, or of their pixels",
    ),
    "report": Job("sparsemae.report.page:report", options.ReportConfig, "one page of curves and masks of runs"),
    "benchmark": Job(
        "sparsemae.benchmark.command:benchmark", options.BenchmarkConfig,
        "packed models or training, beside their rivals",
    ),
}  # fmt: skip


def resolve(reference: Any) -> Any:
    """What ``module:name`` names; anything else is itself."""
    return resolve_name(reference) if isinstance(reference, str) else reference


def training_jobs() -> dict[str, type[options.TrainingConfig]]:
    """The options of the jobs that train, by the job's name."""
    return {name: job.options for name, job in JOBS.items() if issubclass(job.options, options.TrainingConfig)}
