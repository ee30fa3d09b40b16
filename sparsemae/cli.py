"""The command line: one typed function per job, its options read from its dataclass.

Only the chosen job's module is imported, so that ``predict`` on a packed file never loads torch. A user's mistake is
one line on stderr and exit status 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

RECIPES = Path(str(files("sparsemae"))) / "recipes"


class Job(NamedTuple):
    """One command: where its function and configuration live, and the recipe taken when none is named."""

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
    "evaluate": Job("sparsemae.tasks.evaluate", "evaluate", "EvaluateConfig", "accuracy of a finetuned model"),
    "predict": Job("sparsemae.tasks.predict", "predict", "PredictConfig", "classes of image files"),
}  # fmt: skip


class _Parser(ArgumentParser):
    """Reports a mistake in one line: jsonargparse would print usage and tips around it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(self.prog, message)


def fail(program: str, message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``sparsemae``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(importlib.import_module("sparsemae").__version__)
        return
    name, arguments = argv[0], argv[1:]
    program = f"sparsemae {name}"
    if name not in JOBS:
        fail("sparsemae", f"wanted a command ({', '.join(JOBS)}), got {name!r}")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        function, config = parse(name, arguments)
        function(config)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except ImportError as error:
        if debug or error.name is None or error.name.startswith("sparsemae"):
            raise
        fail(program, f"wanted the package {error.name}, which is not installed: pip install 'sparsemae[train]'")
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(program, str(error))


def usage() -> str:
    """The page of ``sparsemae --help``."""
    rows = "\n".join(f"  {name:<10} {job.help}" for name, job in JOBS.items())
    return (
        "usage: sparsemae COMMAND [--config RECIPE] [options]\n\n"
        f"N:M sparse vision transformers by masked autoencoders (SparseMAE).\n\n{rows}\n\n"
        "sparsemae COMMAND --help lists a command's options; --debug shows the traceback of an error.\n"
        f"recipes: {', '.join(recipe_names())}"
    )


def recipe_names() -> list[str]:
    """Names that ``--config`` takes without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(name: str, arguments: Sequence[str]) -> tuple[Callable[[Any], Any], Any]:
    """The job's function and its configuration object, from command-line words."""
    job = JOBS[name]
    module = importlib.import_module(job.module)
    config_class: Any = getattr(module, job.config)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=f"sparsemae {name}", description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="A recipe's name, or a YAML file.")
    required = [item for item in fields(config_class) if item.default is item.default_factory is MISSING]
    many = {item.name for item in required if str(item.type).startswith("list")}
    parser.add_class_arguments(config_class, as_positional=True, skip=many)
    for item in many:
        parser.add_argument(item, nargs="+", type=str, help="One or more files or folders.")
    arguments = _with_recipe_paths(arguments, job.recipe, f"sparsemae {name}")
    parsed = parser.instantiate(parser.parse_args(arguments))
    values = {item.name: getattr(parsed, item.name) for item in fields(config_class)}
    return getattr(module, job.function), config_class(**values)


def _with_recipe_paths(arguments: Sequence[str], default: str | None, program: str) -> list[str]:
    """Replace a bare recipe name after ``--config`` by its file; without ``--config``, put the default first."""
    result, named = [], False
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            named = True
            value = word.partition("=")[2] or next(words, "")
            result += ["--config", str(_recipe(value, program))]
        else:
            result.append(word)
    if default is not None and not named:
        if not {"-h", "--help"} & set(result) and not any(word.startswith("--print_config") for word in result):
            print(f"{program}: no --config given, using the recipe {default} (embedded Fashion-MNIST)", file=sys.stderr)
        result = ["--config", str(RECIPES / f"{default}.yaml"), *result]
    return result


def _recipe(value: str, program: str) -> Path:
    path = Path(value)
    if path.is_file():
        return path
    if value in recipe_names():
        return RECIPES / f"{value}.yaml"
    fail(program, f"--config: wanted a YAML file or a recipe ({', '.join(recipe_names())}), got {value!r}")


if __name__ == "__main__":
    main()
