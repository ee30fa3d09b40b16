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
    examples: tuple[str, ...] = ()
    """Command lines for the help, each run by a test."""
    common: tuple[str, ...] = ()
    """The options that the help shows, by their dotted names."""


TRAIN = "sparsemae.commands.train:train"
_TRAINING = (
    "out", "init", "config", "trainer.epochs", "trainer.global_batch", "optim.lr", "model.name", "data.img_size",
    "sparse.pattern", "data.val_share", "data.exclude", "trainer.accelerator", "seed",
)  # fmt: skip
JOBS = {
    "demo": Job(
        "sparsemae.demo.command:demo", options.DemoConfig, "the whole chain on embedded real images, in minutes",
        None, ("sparsemae demo --minutes 1",), ("task", "minutes", "out", "seed"),
    ),
    "pretrain": Job(
        TRAIN, options.PretrainConfig, "sparse pretraining of a masked autoencoder", "demo_pretrain",
        ("sparsemae pretrain images/ --out runs/pretrained",), (*_TRAINING, "mask_ratio"),
    ),
    "finetune": Job(
        TRAIN, options.FinetuneConfig, "sparse finetuning for classification", "demo_finetune",
        ("sparsemae finetune images/ --out runs/mine", "sparsemae finetune images/ --init auto --out runs/started",
         "sparsemae finetune labels.csv --epochs 30 --batch 16 --lr 5e-4 --out runs/table",
         "sparsemae finetune imagenet/ --config finetune_t --trainer.devices 8"),
        (*_TRAINING, "trainer.keep", "class_weights"),
    ),
    "segment": Job(
        TRAIN, options.SegmentConfig, "sparse finetuning for semantic segmentation", "demo_segment",
        ("sparsemae segment scenes/ --out runs/scenes",), (*_TRAINING, "data.classes", "trainer.keep"),
    ),
    "evaluate": Job(
        "sparsemae.commands.evaluate:evaluate", options.EvaluateConfig, "accuracy or mIoU of a finetuned model",
        None, ("sparsemae evaluate runs/mine", "sparsemae evaluate small.safetensors images/"),
        ("split", "probe", "data.source", "data.root", "data.workers", "inference.scales", "accelerator"),
    ),
    "pack": Job(
        "sparsemae.commands.pack:pack", options.PackConfig, "a finetuned model to one small file for any CPU",
        None, ("sparsemae pack runs/mine small.safetensors",), ("dtype", "license"),
    ),
    "export": Job(
        "sparsemae.commands.export:export", options.ExportConfig,
        "a trained model for timm, transformers or ONNX Runtime", None,
        ("sparsemae export runs/mine for-timm", "sparsemae export runs/mine onnx --to onnx"),
        ("to", "masked", "license", "push"),
    ),
    "check": Job(
        "sparsemae.commands.check:check", options.CheckConfig, "what in a data set would break or spoil a run",
        None, ("sparsemae check images/", "sparsemae check images/ --write-exclude exclude.txt"),
        ("task", "write_exclude", "smallest", "data.source", "data.exclude", "data.workers"),
    ),
    "plan": Job(
        "sparsemae.costs.plan:plan", options.PlanConfig, "what a recipe costs, before it runs",
        None, ("sparsemae plan finetune images/ --epochs 20 --measure true",
               "sparsemae plan finetune_t --devices 8 --images-per-second 2000"),
        ("job", "measure", "devices", "device_batch", "images", "classes", "images_per_second"),
    ),
    "predict": Job(
        "sparsemae.commands.predict:predict", options.PredictConfig, "classes of image files, or of their pixels",
        None, ("sparsemae predict small.safetensors images/",
               "sparsemae predict small.safetensors images/ --format csv --out classes.csv"),
        ("top_k", "format", "out", "pictures", "null"),
    ),
    "report": Job(
        "sparsemae.report.page:report", options.ReportConfig, "one page of curves and masks of runs",
        None, ("sparsemae report runs/mine",), ("out",),
    ),
    "study": Job(
        "sparsemae.study.command:study", options.StudyConfig, "arms at several seeds, compared in pairs", None,
        ("sparsemae study --config study.yaml --plan true",),
        ("config", "out", "root", "seeds", "plan", "print_commands", "report"),
    ),
    "web": Job(
        "sparsemae.commands.web:web", options.WebConfig, "a page that classifies in the visitor's browser", None,
        ("sparsemae web small.safetensors site/",), (),
    ),
    "benchmark": Job(
        "sparsemae.benchmark.command:benchmark", options.BenchmarkConfig, "packed models or training, beside rivals",
        None, ("sparsemae benchmark --quick true", "sparsemae benchmark --section kernels --runs 1"),
        ("section", "quick", "engines", "dense", "batches", "threads", "runs", "images", "json"),
    ),
}  # fmt: skip


def resolve(reference: Any) -> Any:
    """What ``module:name`` names; anything else is itself."""
    return resolve_name(reference) if isinstance(reference, str) else reference


def training_jobs() -> dict[str, type[options.TrainingConfig]]:
    """The options of the jobs that train, by the job's name."""
    return {name: job.options for name, job in JOBS.items() if issubclass(job.options, options.TrainingConfig)}
