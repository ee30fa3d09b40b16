"""Options of the commands that take recipes and nested settings, read by jsonargparse."""

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

OPTIONAL_POSITIONAL = "files"
"""A list field of this name takes any number of positional arguments, none included."""

_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
    "dict": "options by name", "NoneType": "null",
}  # fmt: skip
_EXPECTED = re.compile(r"Expected an? (.+?)(?=\. $| - Expected| Given value type|$)")


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


def reworded(message: str) -> str:
    """What jsonargparse says of an option, one line, as the rest of the package does: what was wanted, what was got."""
    if found := re.match(r'Parser key "([\w.]+)": (.*?)G(?:ot|iven) value: (.*)', message):
        wanted = dict.fromkeys(_in_words(kind) for kind in _EXPECTED.findall(found[2]))
        return f"{found[1]}: wanted {' or '.join(wanted)}, got {found[3]}" if wanted else message
    if found := re.match(r"Parser key \"([\w.]+)\": Unable to load config '(.*?)' - ", message):
        return f"{found[1]}: wanted {_TYPES['dict']}, got {found[2]}"
    if found := re.fullmatch(r"Group '([\w.]+)' does not accept option '(.*)'", message):
        return f"{found[1]}: wanted options it has, got {found[2]}"
    return message


def _in_words(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        return ", ".join(re.findall(r"'([^']*)'", kind))
    named = re.fullmatch(r"<class '(\w+)'>", kind)
    return _TYPES.get(named[1], named[1]) if named else f"a {kind}"
