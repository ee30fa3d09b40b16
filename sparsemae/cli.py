"""The command line: a thin shell around one typed function per job (`jobs`).

A user's mistake is one line on stderr and exit status 2; ``--debug`` shows the traceback. Options are read before the
job's own module is loaded, which may load torch.
"""

import difflib
import json
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sparsemae import __version__
from sparsemae.config import check_paths, completion, help_page, read_config, recipe_names, split_words
from sparsemae.jobs import JOBS, resolve, training_jobs
from sparsemae.terminal import make_safe, printable


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``sparsemae``."""
    words = list(sys.argv[1:] if argv is None else argv)
    make_safe()
    debug = "--debug" in words[1:]
    words = words[:1] + [word for word in words[1:] if word != "--debug"]
    program = f"sparsemae {words[0]}" if words and words[0] in JOBS else "sparsemae"
    try:
        try:
            _obey(words, program)
        except SystemExit:  # argparse's, after the page of --help-all
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("sparsemae"):
            raise
        fail(program, f"wanted the package {error.name}, which is not installed: pip install 'sparsemae[train]'")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if debug or (isinstance(error, RuntimeError) and not _is_for_want_of_memory(error)):
            raise
        left = isinstance(error, BrokenPipeError) and _reader_has_left()
        try:
            sys.stdout.flush()
        except OSError:  # the end of Python would try again, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not left:
            fail(program, str(error) or "out of memory")


def _obey(words: list[str], program: str) -> Any:
    """What the words say."""
    if not words or words[0] in ("-h", "--help"):
        return print(usage())
    if words[0] == "--version":
        return print(__version__)
    if words[0] == "--completion":
        shell = " ".join(words[1:])
        return print(completion(shell, {name: resolve(job.options) for name, job in JOBS.items()}))
    name, *words = words
    if name not in JOBS:
        meant = difflib.get_close_matches(name, JOBS, 1)
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        raise ValueError(f"wanted a command ({', '.join(JOBS)}), got {name!r}{hint}")
    job = JOBS[name]
    if {"-h", "--help"} & set(words):
        return print(help_page(job.options, program, job.examples, job.common))
    if name == "plan" and words and words[0] in training_jobs():
        own, others = split_words(job.options, words[1:])
        words = [words[0], *own, f"--words={json.dumps(others)}"]
    config: Any = read_config(job.options, words, program, job.recipe)
    check_paths(config)
    return resolve(job.function)(config)


def fail(program: str, message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    print(f"{program}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def usage() -> str:
    """The page of ``sparsemae --help``."""
    rows = "\n".join(f"  {name:<10} {job.help}" for name, job in JOBS.items())
    return (
        "usage: sparsemae COMMAND [DATA] [--config RECIPE] [options]\n\n"
        f"Small vision transformers by N:M sparse training with masked autoencoders (SparseMAE).\n\n{rows}\n\n"
        "  sparsemae finetune images/ --out runs/mine      # a folder of class folders\n\n"
        "sparsemae COMMAND --help shows examples and common options; --debug the traceback of an error.\n"
        "sparsemae --completion bash (or zsh, tcsh): completion for the shell, by the package shtab\n"
        f"recipes: {', '.join(recipe_names())}"
    )


def _is_for_want_of_memory(error: RuntimeError) -> bool:
    """In torch's words, on a CPU or a GPU; or of what is nested too deeply."""
    return isinstance(error, RecursionError) or "allocate" in str(error)


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after ``| head``."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    main()
