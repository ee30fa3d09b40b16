"""From the command line and recipes to a job's dataclass. The dataclass fields are the only source of defaults."""

import difflib
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from sparsemae.limits import marked
from sparsemae.plain_yaml import read_yaml
from sparsemae.renamed import OPTIONS, new_option, renamed

RECIPES = Path(__file__).parent / "recipes"
Config = TypeVar("Config")
OPTIONAL_POSITIONAL = "files"
"""A list field of this name takes any number of positional arguments, none included."""
SHORT = {
    "epochs": "trainer.epochs",
    "batch": "trainer.global_batch",
    "lr": "optim.lr",
    "model": "model.name",
    "img_size": "data.img_size",
}
"""Short names of options of the jobs that train."""
_ALONE = ("help", "help_all", "print_config")
"""Options that take no value, or one after ``=``."""


class _Parser(ArgumentParser):
    """Raises instead of printing usage and tips: the command line says it in one line, with the name that was meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if word := re.search(r"unrecognized arguments: --([\w.]+)", message, re.IGNORECASE):
            known = [*SHORT, *(name[2:] for name in self._option_string_actions if name.startswith("--"))]
            leaf = word[1].rpartition(".")[2]
            meant = difflib.get_close_matches(word[1], known, 1) + [n for n in known if n.rpartition(".")[2] == leaf]
            message += "".join(f" (did you mean --{name}?)" for name in meant[:1])
        raise ValueError(message) from ex


def recipe_names() -> list[str]:
    """Names that ``--config`` takes without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_config(
    kind: type[Config], argv: Sequence[str], program: str = "sparsemae", recipe: str | None = None
) -> Config:
    """Parse ``ROOT --config RECIPE --field.sub VALUE ...`` into a dataclass.

    ``--help-all`` and ``--print_config`` print and exit.
    Fields without a default are positional; a list among them takes one or more arguments. Of a job with data one more
    word is ``data.root``.

    Args:
        recipe: taken, and said so, where neither a recipe nor data are named.

    Raises:
        ValueError: in one line, on an unknown option, a value of the wrong type, or an unknown recipe.
    """
    recipes, words = _resolved(kind, argv)
    named = {name for word in words for name in _names(word)}
    if recipe and not recipes and not named & {"data", "data.root", "data.source", "help", "help_all"}:
        print(f"{program}: no data and no --config given, using the recipe {recipe} (embedded Fashion-MNIST)",
              file=sys.stderr)  # fmt: skip
        recipes = [_recipe(recipe)]
    parser = _parser(kind, program)  # type: ignore[arg-type]
    # recipes before what is named, which they must not override; what they name themselves counts more than auto
    first = ["--data.source=auto"] * ("data.root" in named) + [w for path in recipes for w in ("--config", path)]
    try:
        given = first + ["--help" if word == "--help_all" else word for word in words]
        parsed: Any = parser.instantiate(parser.parse_args(given))
    except ValueError as error:
        said, files = " ".join(str(error).split()), [path for path in recipes if "\n" not in path]
        if files and said.startswith(("Parser key", "Group")) and not any(name in said for name in named - {"config"}):
            said = f"--config: {', '.join(files)}: {said}"
        raise ValueError(said) from error
    config = kind(**{member.name: getattr(parsed, member.name) for member in fields(kind)})  # type: ignore[arg-type]
    if not recipes and not getattr(config, "from_data", True):
        open_ones = [name for name, _ in marked(config, "from_data") if name not in named]
        config.from_data = open_ones  # type: ignore[attr-defined]
    return config


@cache
def _parser(kind: type[Any], program: str) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=program, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="A recipe's name, or a YAML file.")
    members = fields(kind)
    lists = {member.name for member in members if str(member.type).startswith("list")}
    many = dict.fromkeys(lists & set(_positional(kind)), "+") | dict.fromkeys(lists & {OPTIONAL_POSITIONAL}, "*")
    parser.add_class_arguments(kind, as_positional=True, skip=set(many))
    for name, nargs in many.items():
        default: Any = {"default": []} if nargs == "*" else {}
        parser.add_argument(name, nargs=nargs, type=str, help="Files or folders.", **default)
    return parser


def _positional(kind: type[Any]) -> list[str]:
    return [member.name for member in fields(kind) if member.default is member.default_factory is MISSING]


def help_page(kind: type[Any], program: str, examples: Sequence[str], common: Sequence[str]) -> str:
    """A page for people: what the command is for, examples, and the common options by their dotted names."""
    parser = _parser(kind, program)  # type: ignore[arg-type]
    actions = {name: action for action in parser._actions for name in (*action.option_strings, action.dest)}
    root = ["[DATA]"] * _takes_root(kind)
    lines = [f"usage: {' '.join([program, *(name.upper() for name in _positional(kind)), *root])} [options]", ""]
    lines += [(kind.__doc__ or "").partition("\n")[0], "", *(f"  {example}" for example in examples), ""]
    for name in (*_positional(kind), *common):
        short = next((short for short, dotted in SHORT.items() if dotted == name and _trains(kind)), name)
        what = textwrap.shorten(re.split(r"(?<=[.])\s", " ".join((actions[name].help or "").split()))[0], 230)
        what += f" {actions[name].metavar}" * str(actions[name].metavar).startswith("{")
        head = name.upper() if name in _positional(kind) else f"--{short.replace('_', '-')}"
        lines += textwrap.wrap(what, 110, initial_indent=f"  {head:<22}", subsequent_indent=" " * 24)
    return "\n".join([*lines, "", f"{program} --help-all lists every option"])


def check_paths(config: Any) -> None:
    """Raises ValueError, naming the option, if a file or folder, or the recipe, that a job is to read is not there."""
    if hasattr(config, "recipe") and config.words is None:
        _recipe(config.recipe)
    for option, value in marked(config, "must_exist"):
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not Path(path).exists():
                raise ValueError(f"{option}: {path}: no such file or folder")


def _resolved(kind: type[Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Recipes by their file, and the other words: options by their whole names, with underscores, and the data's root.

    A value stands after ``=``, so that each word names what it sets.
    """
    recipes, result, rest, positional = list[str](), list[str](), iter(argv), _positional(kind)
    for word in rest:
        if not word.startswith("--"):
            extra = not positional and _takes_root(kind)
            positional = positional[1:]
            result.append(f"--data.root={word}" if extra and not word.startswith("-") else word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if new := new_option(name):
            raise ValueError(f"--{name}: wanted --{new}, as it is called now")
        if not equals and name not in _ALONE:
            found = next(rest, None)
            if found is None:
                raise ValueError(f"--{name}: wanted a value, got none")
            value = found
        if name == "config":
            recipes.append(_recipe(value))
        elif name in _ALONE:
            result.append(f"--{name}{equals}{value}")
        else:
            short = _trains(kind) and not value.lstrip().startswith("{")
            result.append(f"--{SHORT.get(name, name) if short else name}={value}")
    return recipes, result


def split_words(kind: type[Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that set a field of the dataclass, and the others, each option with its value after ``=``."""
    names = {member.name for member in fields(kind)} - {"recipe", "words"}
    own, others, rest = list[str](), list[str](), iter(argv)
    for word in rest:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and "=" not in word and name not in _ALONE:
            word += f"={next(rest, '')}"  # noqa: PLW2901
        (own if word.startswith("--") and name in names else others).append(word)
    return own, others


def _trains(kind: type[Any]) -> bool:
    return any(member.name == "trainer" for member in fields(kind))


def _takes_root(kind: type[Any]) -> bool:
    """Whether a word that no field takes is the root of the data."""
    return any(member.name == "data" and member.default is MISSING for member in fields(kind))


def _names(word: str) -> Iterator[str]:
    """Dotted names of what a word sets, those in a mapping included."""
    name, _, value = word.removeprefix("--").partition("=")
    yield name
    if word.startswith("--") and value.lstrip().startswith("{"):
        with suppress(yaml.YAMLError):
            mapping = yaml.safe_load(value)
            yield from (f"{name}.{key}" for key in (mapping if isinstance(mapping, dict) else ()))


def _recipe(name: str) -> str:
    """What jsonargparse takes for a recipe: its file, or its content where names in it are of an earlier version."""
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file() or not name:
        raise ValueError(f"--config: wanted a YAML file or a recipe ({', '.join(recipe_names())}), got {name!r}")
    try:
        settings = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {path}: wanted options by name, got {settings!r:.60}")
    current = renamed(settings, OPTIONS)
    return str(path) if current == settings else yaml.safe_dump(current, sort_keys=False)
