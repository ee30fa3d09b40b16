"""Options of the commands that take recipes and nested settings, read by jsonargparse."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

OPTIONAL_POSITIONAL = "files"
"""A list field of this name takes any number of positional arguments, none included."""


class _Parser(ArgumentParser):
    """Raises instead of printing usage and tips."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message) from ex


def recipe_parser(kind: type[Any], program: str, positional: Sequence[str]) -> ArgumentParser:
    """A parser of a dataclass's fields; a list among the positional ones takes one or more arguments."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=program, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="A recipe's name, or a YAML file.")
    lists = {member.name for member in fields(kind) if str(member.type).startswith("list")}
    many = dict.fromkeys(lists & set(positional), "+") | dict.fromkeys(lists & {OPTIONAL_POSITIONAL}, "*")
    parser.add_class_arguments(kind, as_positional=True, skip=set(many))
    for name, nargs in many.items():
        default: Any = {"default": []} if nargs == "*" else {}
        parser.add_argument(name, nargs=nargs, type=str, help="Files or folders.", **default)
    return parser
