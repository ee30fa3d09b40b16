"""The command line: a thin shell around one typed function per job (`jobs`).

A user's mistake is one line on stderr and exit status 2; ``--debug`` shows the traceback. Options are read before the
job's own module is loaded, which may load torch.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sparsemae import __version__
from sparsemae.config import check_paths, read_config, recipe_names
from sparsemae.jobs import JOBS, Job, resolve
from sparsemae.terminal import make_safe, printable


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``sparsemae``."""
    words = list(sys.argv[1:] if argv is None else argv)
    make_safe()
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
        config: Any = read_config(job.options, _with_default_recipe(words, job, program), program)
        check_paths(config)
        resolve(job.function)(config)
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
    print(f"{program}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
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
