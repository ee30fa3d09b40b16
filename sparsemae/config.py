"""From the command line and recipes to a job's dataclass. The dataclass fields are the only source of defaults."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
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


class _Parser(ArgumentParser):
    """Raises instead of printing usage and tips: the command line says it in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message) from ex


def recipe_names() -> list[str]:
    """Names that ``--config`` takes without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_config(kind: type[Config], argv: Sequence[str], program: str = "sparsemae") -> Config:
    """Parse ``--config RECIPE --field.sub VALUE ...`` into a dataclass.

    ``--help`` and ``--print_config`` print and exit.
    Fields without a default are positional; a list among them takes one or more arguments.
    Raises ValueError, in one line, on an unknown option, a value of the wrong type, or an unknown recipe.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=program, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="A recipe's name, or a YAML file.")
    members = fields(kind)  # type: ignore[arg-type]
    required = {member.name for member in members if member.default is member.default_factory is MISSING}
    lists = {member.name for member in members if str(member.type).startswith("list")}
    many = dict.fromkeys(lists & required, "+") | dict.fromkeys(lists & {OPTIONAL_POSITIONAL}, "*")
    parser.add_class_arguments(kind, as_positional=True, skip=set(many))
    for name, nargs in many.items():
        default: Any = {"default": []} if nargs == "*" else {}
        parser.add_argument(name, nargs=nargs, type=str, help="Files or folders.", **default)
    parsed: Any = parser.instantiate(parser.parse_args(_resolved(argv)))
    return kind(**{member.name: getattr(parsed, member.name) for member in members})


def check_paths(config: Any) -> None:
    """Raises ValueError, naming the option, if a file or folder, or the recipe, that a job is to read is not there."""
    if hasattr(config, "recipe"):
        _recipe(config.recipe)
    for option, value in marked(config, "must_exist"):
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not Path(path).exists():
                raise ValueError(f"{option}: {path}: no such file or folder")


def _resolved(argv: Sequence[str]) -> list[str]:
    """Recipes by their file and before all else, which they must not override; options with underscores."""
    recipes, result, rest = list[str](), list[str](), iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--config":
            recipes += ["--config", _recipe(value if equals else next(rest, ""))]
        elif word.startswith("--"):
            name = name[2:].replace("-", "_")
            if new := new_option(name):
                raise ValueError(f"--{name}: wanted --{new}, as it is called now")
            result.append(f"--{name}{equals}{value}")
        else:
            result.append(word)
    return recipes + result


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
