"""From command-line words and recipes to a job's dataclass. The dataclass fields are the only source of defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

RECIPES = Path(__file__).parent / "recipes"
Config = TypeVar("Config")
OPTIONAL_WORDS = "files"
"""A list field of this name takes any number of positional words, none included."""


class _Parser(ArgumentParser):
    """Raises instead of printing usage and tips: the command line says it in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message) from ex


def recipe_names() -> list[str]:
    """Names that ``--config`` takes without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_config(kind: type[Config], words: Sequence[str], program: str = "sparsemae") -> Config:
    """Parse ``--config RECIPE --field.sub VALUE ...`` into a dataclass.

    ``--help`` and ``--print_config`` print and exit.
    Fields without a default are positional; a list among them takes one or more words.
    Raises ValueError, in one line, on an unknown option, a value of the wrong type, or an unknown recipe.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=program, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="A recipe's name, or a YAML file.")
    members = fields(kind)  # type: ignore[arg-type]
    required = {member.name for member in members if member.default is member.default_factory is MISSING}
    lists = {member.name for member in members if str(member.type).startswith("list")}
    many = dict.fromkeys(lists & required, "+") | dict.fromkeys(lists & {OPTIONAL_WORDS}, "*")
    parser.add_class_arguments(kind, as_positional=True, skip=set(many))
    for name, nargs in many.items():
        default: Any = {"default": []} if nargs == "*" else {}
        parser.add_argument(name, nargs=nargs, type=str, help="Files or folders.", **default)
    parsed: Any = parser.instantiate(parser.parse_args(_recipe_files(words)))
    return kind(**{member.name: getattr(parsed, member.name) for member in members})


def _recipe_files(words: Sequence[str]) -> list[str]:
    """Replace a bare recipe name after ``--config`` by its file; take ``--write-exclude`` for ``--write_exclude``."""
    result: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            result += ["--config", str(_recipe(word.partition("=")[2] or next(rest, "")))]
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            result.append("--" + name[2:].replace("-", "_") + equals + value)
        else:
            result.append(word)
    return result


def _recipe(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    raise ValueError(f"--config: wanted a YAML file or a recipe ({', '.join(recipe_names())}), got {name!r}")
