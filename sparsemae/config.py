"""From the command line and recipes to a job's dataclass. The dataclass fields are the only source of defaults."""

import difflib
import re
import sys
import textwrap
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from sparsemae.limits import flatten, marked
from sparsemae.plain_parser import PlainParser
from sparsemae.renamed import OPTIONS, new_option, renamed

RECIPES = Path(__file__).parent / "recipes"
Config = TypeVar("Config")
SHORT = {
    "epochs": "trainer.epochs",
    "batch": "trainer.global_batch",
    "lr": "optim.lr",
    "model": "model.name",
    "img_size": "data.img_size",
    "keep": "trainer.keep",
}
"""Short names of options of the jobs that train."""
INSTEAD = {"trainer.epochs": "trainer.steps", "optim.warmup_epochs": "optim.warmup_steps"}
"""Lengths in epochs, and the lengths in steps that count instead of them where they are given."""
_ALONE = ("help", "help_all", "print_config")
"""Options that take no value, or one after ``=``."""


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
    parser: Any = _parser(kind, program)  # type: ignore[arg-type]
    plain = isinstance(parser, PlainParser)
    named = set[str]() if plain else {name for word in words for name in _names(word)}
    if recipe and not recipes and not named & {"data", "data.root", "data.source", "help", "help_all"}:
        print(f"{program}: no data and no --config given, using the recipe {recipe} (embedded Fashion-MNIST)",
              file=sys.stderr)  # fmt: skip
        recipes = [_recipe(recipe)]
    words = ["--help" if word == "--help_all" else word for word in words]
    try:
        if plain:
            made: Config = parser.made(words, [settings for _, settings in recipes])
            return made
        return _with_recipes(kind, parser, recipes, words, named)
    except ValueError as error:
        said = re.sub(r"argument (--[\w.]+): expected one argument", r"\1: wanted a value, got none", str(error))
        raise ValueError(f"{said}{_meant(said, parser)}") from error


def _with_recipes(
    kind: type[Config],
    parser: Any,
    recipes: Sequence[tuple[str, dict[str, Any]]],
    words: Sequence[str],
    named: set[str],
) -> Config:
    """By jsonargparse."""
    # recipes before what is named, which they must not override; what they name themselves counts more than auto
    first = ["--data.source=auto"] * _takes_root(kind)
    for path, settings in recipes:
        first += [*_in_epochs(kind, flatten(settings)), "--config", path]
    try:
        parsed: Any = parser.instantiate(parser.parse_args([*first, *_in_epochs(kind, named), *words]))
    except ValueError as error:
        from sparsemae.recipe_parser import reworded

        said, files = " ".join(str(error).split()), [path for path, _ in recipes if "\n" not in path]
        in_recipe = said.startswith(("Parser key", "Group")) and not any(name in said for name in named - {"config"})
        where = f"--config: {', '.join(files)}: " if files and in_recipe else ""
        raise ValueError(where + reworded(said)) from error
    config = kind(**{member.name: getattr(parsed, member.name) for member in fields(kind)})  # type: ignore[arg-type]
    if not recipes and not getattr(config, "from_data", True):
        open_ones = [name for name, _ in marked(config, "from_data") if name not in named]
        config.from_data = open_ones  # type: ignore[attr-defined]
    return config


def _in_epochs(kind: type[Any], named: Collection[str]) -> list[str]:
    """Words that unset lengths in steps, of a recipe before: naming one in epochs would otherwise change nothing."""
    return [f"--{steps}=null" for epochs, steps in INSTEAD.items() if _trains(kind) and epochs in named]


def _meant(message: str, parser: Any) -> str:
    """The option that a misspelled one stands for, if there is one."""
    if not (word := re.search(r"unrecognized arguments: --([\w.]+)", message, re.IGNORECASE)):
        return ""
    known = [*SHORT, *(name[2:] for name in parser._option_string_actions if name.startswith("--"))]
    leaf = word[1].rpartition(".")[2]
    meant = difflib.get_close_matches(word[1], known, 1) + [n for n in known if n.rpartition(".")[2] == leaf]
    return "".join(f" (did you mean --{name}?)" for name in meant[:1])


@cache
def _parser(kind: type[Any], program: str) -> Any:
    """argparse for the commands of the bare install, jsonargparse for the others."""
    if getattr(kind, "bare", False):
        return PlainParser(kind, program, _positional(kind))
    from sparsemae.recipe_parser import recipe_parser

    return recipe_parser(kind, program, _positional(kind))


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


def completion(shell: str, options: Mapping[str, type[Any]]) -> str:
    """A script by which a shell completes commands, options, choices and files: jsonargparse's, by shtab.

    Raises ValueError if there is none for that shell, or no shtab.
    """
    if find_spec("shtab") is None:
        raise ValueError("--completion: wanted the package shtab, which is not installed: pip install shtab")
    import shtab
    from jsonargparse import ArgumentParser

    from sparsemae.recipe_parser import recipe_parser

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"--completion: wanted {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
    whole = ArgumentParser(prog="sparsemae")
    commands = whole.add_subcommands()
    for name, kind in options.items():
        parser = recipe_parser(kind, f"sparsemae {name}", _positional(kind))
        if _takes_root(kind):
            parser.add_argument("root", nargs="?")
        for short, dotted in SHORT.items() if _trains(kind) else ():
            if f"--{short}" not in parser._option_string_actions:
                parser._option_string_actions[f"--{dotted}"].option_strings += [f"--{short}"]  # type: ignore[operator]
        for action in parser._actions:
            if getattr(action, "_typehint", str) in (str, str | None, list[str]):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_subcommand(name, parser)
    return str(whole.get_completion_script(f"shtab-{shell}"))


def recipe_settings(name: str) -> dict[str, Any]:
    """What a recipe sets, by the names of now. Raises ValueError as `read_config` does."""
    return _recipe(name)[1]


def check_paths(config: Any, but: Sequence[str] = ()) -> None:
    """Raises ValueError, naming the option, if a file or folder, or the recipe, that a job is to read is not there.

    Args:
        but: options that may name what is yet to be made.
    """
    if hasattr(config, "recipe") and config.words is None:
        _recipe(config.recipe)
    for option, value in marked(config, "must_exist"):
        for path in value if isinstance(value, list) else [value]:
            if option not in but and path is not None and not Path(path).exists():
                raise ValueError(f"{option}: {path}: no such file or folder")


def _resolved(kind: type[Any], argv: Sequence[str]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Recipes, see `_recipe`, and the other words: options by their whole names, with underscores, and the data's root.

    A value stands after ``=``, so that each word names what it sets. A switch of the command itself needs none.
    """
    recipes, result = list[tuple[str, dict[str, Any]]](), list[str]()
    rest, positional = deque(argv), _positional(kind)
    while rest:
        word = rest.popleft()
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
            given = _value(kind, name, rest)
            equals, value = ("", "") if given is None else ("=", given)
        if name == "config" and equals:
            recipes.append(_recipe(value))
        else:
            short = _trains(kind) and not value.lstrip().startswith("{")
            result.append(f"--{SHORT.get(name, name) if short else name}{equals}{value}")
    return recipes, result


def _value(kind: type[Any], name: str, rest: deque[str]) -> str | None:
    """The next word, if there is one; of a switch of the command itself ``true``, unless the next word says which."""
    switches = {member.name for member in fields(kind) if member.type in (bool, "bool")}
    if name in switches and (not rest or rest[0].lower() not in ("true", "false")):
        return "true"
    return rest.popleft() if rest else None


def split_words(kind: type[Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that set a field of the dataclass, and the others, each option with its value after ``=``."""
    names = {member.name for member in fields(kind)} - {"recipe", "words"}
    own, others, rest = list[str](), list[str](), deque(argv)
    while rest:
        word = rest.popleft()
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and "=" not in word and name not in _ALONE:
            value = _value(kind, name, rest)
            word += f"={value}" * (value is not None)
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
        import yaml

        with suppress(yaml.YAMLError):
            mapping = yaml.safe_load(value)
            yield from (f"{name}.{key}" for key in (mapping if isinstance(mapping, dict) else ()))


def _recipe(name: str) -> tuple[str, dict[str, Any]]:
    """What jsonargparse takes for a recipe: its file, or its content where names in it are of an earlier version.

    And its settings by the names of now.
    """
    import yaml

    from sparsemae.plain_yaml import read_yaml

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
    return str(path) if current == settings else yaml.safe_dump(current, sort_keys=False), current
