"""Options of the commands that the bare install has (predict, evaluate, web), read by the standard library alone.

The other commands are read by jsonargparse (`recipe_parser`), which the extra `train` brings; both take the same words.
"""

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from sparsemae.limits import flatten


class PlainParser(argparse.ArgumentParser):
    """Makes a dataclass of words; the docstrings of its fields are the help. Errors are ValueErrors."""

    def __init__(self, kind: type[Any], program: str, positional: Sequence[str]) -> None:
        super().__init__(program, description=kind.__doc__, allow_abbrev=False)
        self.kind = kind
        self.add_argument("--config", metavar="CONFIG", help="A recipe's name, or a YAML file.")
        for name, hint, default, text in _leaves(kind):
            read, many = partial(_read, hint), "+" if get_origin(hint) is list else None
            if name in positional:
                self.add_argument(name, nargs=many, type=str, help=text)
                continue
            choices = f"{{{','.join(_choices(hint))}}}" if _choices(hint) else None
            said = f"{text} (default: {json.dumps(default)})".replace("%", "%%")
            self.add_argument(f"--{name}", type=read, default=argparse.SUPPRESS, help=said, metavar=choices)

    def made(self, words: Sequence[str], recipes: Sequence[Mapping[str, Any]] = ()) -> Any:
        """The dataclass. What the words say counts more than the recipes.

        Raises ValueError on an unknown option or a value of another type.
        """
        settings = [f"--{k}={_text(v)}" for recipe in recipes for k, v in flatten(recipe).items()]
        options = [one for word in [*settings, *words] if word.startswith("--") for one in _unfolded(word)]
        found = vars(self.parse_args([*(word for word in words if not word.startswith("--")), *options]))
        found.pop("config")
        return _make(self.kind, found)

    def error(self, message: str) -> NoReturn:
        """In place of the usage on stderr."""
        raise ValueError(message)


def _leaves(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Dotted name, type, default and docstring of each field, those of nested dataclasses included."""
    hints, texts = get_type_hints(kind), dict[str, str]()
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(default):
            yield from _leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], default, texts.get(field.name, "")


def _make(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A dataclass of values by their dotted names; the others have their defaults."""
    hints, found = get_type_hints(kind), {name: value for name, value in values.items() if "." not in name}
    for name in dict.fromkeys(name.partition(".")[0] for name in values if "." in name):
        inner = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
        found[name] = _make(hints[name], inner)
    return kind(**found)


def _unfolded(word: str) -> list[str]:
    """A word that sets several options by a mapping, as one word each."""
    name, _, value = word.partition("=")
    if not value.lstrip().startswith("{"):
        return [word]
    try:
        return [f"{name}.{key}={_text(one)}" for key, one in flatten(_flow(value)).items()]
    except ValueError:
        raise ValueError(f"{name}: wanted names and values in braces, got {value!r:.60}") from None


def _flow(text: str) -> Any:
    """Lists and mappings as YAML has them on one line: JSON whose words may lack their quotes."""
    words = r'"[^"]*"|[^\s,:{}\[\]"](?:[^,:{}\[\]"]|:(?!\s))*'
    return json.loads(re.sub(words, lambda word: _quoted(word[0].strip()), text))


def _quoted(word: str) -> str:
    try:
        json.loads(word)
    except ValueError:
        return json.dumps(word)
    return word


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _choices(hint: Any) -> tuple[str, ...]:
    return next((get_args(one) for one in (hint, *get_args(hint)) if get_origin(one) is Literal), ())


def _read(hint: Any, text: str) -> Any:
    """A value of a field's type. Raises ArgumentTypeError if it is of another."""
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if NoneType in kinds and text in ("null", "None"):
        return None
    kind = kinds[0]
    items, origin = get_args(kind), get_origin(kind)
    try:
        if origin is Literal:
            return items[items.index(text)]
        if origin in (list, tuple):
            values = _flow(text)
            if not isinstance(values, list) or (origin is tuple and len(values) != len(items)):
                raise ValueError(text)
            each = items if origin is tuple else items * len(values)
            return origin(_read(one, _text(value)) for one, value in zip(each, values, strict=True))
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError, argparse.ArgumentTypeError):
        wanted = " or ".join(_choices(hint)) or str(getattr(hint, "__name__", hint)).replace("NoneType", "null")
        raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}") from None
