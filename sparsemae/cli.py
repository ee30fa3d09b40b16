"""The command line: a thin shell around one typed function per job.

Only the chosen job's module is imported. A user's mistake is one line on stderr and exit status 2; ``--debug`` shows
the traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from sparsemae import __version__
from sparsemae.config import read_config, recipe_names


class Job(NamedTuple):
    """One command: its function and dataclass, and the recipe taken when none is named."""

    module: str
    function: str
    config: str
    help: str
    recipe: str | None = None


JOBS = {
    "demo": Job("sparsemae.demo", "demo", "DemoConfig", "the whole chain on embedded real images, in minutes"),
    "pretrain": Job(
        "sparsemae.tasks.pretrain", "pretrain", "PretrainConfig", "sparse pretraining of a masked autoencoder",
        "demo_pretrain",
    ),
    "finetune": Job(
        "sparsemae.tasks.finetune", "finetune", "FinetuneConfig", "sparse finetuning for classification",
        "demo_finetune",
    ),
    "segment": Job(
        "sparsemae.tasks.segment", "segment", "SegmentConfig", "sparse finetuning for semantic segmentation",
        "demo_segment",
    ),
    "evaluate": Job("sparsemae.tasks.evaluate", "evaluate", "EvaluateConfig", "accuracy or mIoU of a finetuned model"),
    "pack": Job("sparsemae.tasks.pack", "pack", "PackConfig", "a finetuned model to one small file for any CPU"),
    "check": Job("sparsemae.tasks.check", "check", "CheckConfig", "what in a data set would break or spoil a run"),
    "plan": Job("sparsemae.plan", "plan", "PlanConfig", "what a recipe costs, before it runs"),
    "predict": Job("sparsemae.tasks.predict", "predict", "PredictConfig", "classes of image files, or of their pixels"),
    "report": Job("sparsemae.report.page", "report", "ReportConfig", "one page of curves and masks of runs"),
    "benchmark": Job(
        "sparsemae.benchmark.command", "benchmark", "BenchmarkConfig", "packed models or training, beside their rivals"
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``sparsemae``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        return print(usage())
    if words[0] == "--version":
        return print(__version__)
    name = words.pop(0)
    if name not in JOBS:
        fail("sparsemae", f"wanted a command ({', '.join(JOBS)}), got {name!r}")
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    program, job = f"sparsemae {name}", JOBS[name]
    try:
        module = importlib.import_module(job.module)
        config = read_config(getattr(module, job.config), _with_default_recipe(words, job, program), program)
        getattr(module, job.function)(config)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("sparsemae"):
            raise
        fail(program, f"wanted the package {error.name}, which is not installed: pip install 'sparsemae[train]'")
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(program, str(error))


def fail(program: str, message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def usage() -> str:
    """The page of ``sparsemae --help``."""
    rows = "\n".join(f"  {name:<10} {job.help}" for name, job in JOBS.items())
    return (
        "usage: sparsemae COMMAND [--config RECIPE] [options]\n\n"
        f"Small vision transformers by N:M sparse training with masked autoencoders (SparseMAE).\n\n{rows}\n\n"
        "sparsemae COMMAND --help lists a command's options; --debug shows the traceback of an error.\n"
        f"recipes: {', '.join(recipe_names())}"
    )


def _with_default_recipe(words: list[str], job: Job, program: str) -> list[str]:
    """Without a recipe and without data of one's own, a job runs on the embedded images."""
    if job.recipe is None or any(word.startswith(("--config", "--data.source", "-h", "--help")) for word in words):
        return words
    print(f"{program}: no --config given, using the recipe {job.recipe} (embedded Fashion-MNIST)", file=sys.stderr)
    return ["--config", job.recipe, *words]


if __name__ == "__main__":
    main()
