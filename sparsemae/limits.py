"""Limits of settings, checked when a configuration is made: one line that says what was wanted and what was got."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from typing import Any, ClassVar, TypeVar

UNIT_INTERVAL = (0.0, 1.0)
AT_LEAST_0 = (0.0, math.inf)
AT_LEAST_1 = (1.0, math.inf)
ABOVE_0 = (math.ulp(0.0), math.inf)
UP_TO_1 = (math.ulp(0.0), 1.0)
BETWEEN_0_AND_1 = (math.ulp(0.0), math.nextafter(1.0, 0.0))
BELOW_1 = (0.0, math.nextafter(1.0, 0.0))
MOST_PROCESSES = 1024
"""That one process starts at the wish of an option."""
MAX_PIXELS = 178_956_970
"""Of an image, where nothing else is said: what Pillow itself takes, and so all of ImageNet-1K and ADE20K."""

T = TypeVar("T")


def check_limits(settings: Any, prefix: str, **limits: tuple[float, float]) -> None:
    """Raises ValueError, naming ``prefix`` and field, if a number (or one of a tuple) is below or above its limits.

    None passes.
    """
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple | list) else () if value is None else (value,)
        if not all(least <= number <= most for number in numbers):  # nan is within none
            shown = list(value) if isinstance(value, tuple | list) else f"{value:g}"
            raise ValueError(f"{prefix}{name}: wanted {_range(least, most)}, got {shown}")


def whole_number(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """A whole number from outside. Raises ValueError, naming it, if it is none, or below or above its limits."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise ValueError(f"{name}: wanted a whole number, {_range(least, most)}, got {value!r:.40}")
    return int(value)


def _range(least: float, most: float) -> str:
    low = "more than 0" if least == ABOVE_0[0] else f"at least {least:g}"
    high = "below 1" if most == BELOW_1[1] else f"at most {most:g}"
    return low if most == math.inf else f"{low} and {high}"


@dataclass
class Options:
    """Base of the dataclasses of settings: limits are checked when one is made."""

    prefix: ClassVar[str] = ""
    """Of the fields' names in messages."""

    def __post_init__(self) -> None:
        limits = {member.name: member.metadata.get("limits") for member in fields(self)}
        check_limits(self, self.prefix, **{name: wanted for name, wanted in limits.items() if wanted})


def option(
    default: T,
    limits: tuple[float, float] | None = None,
    *,
    may_change: bool = False,
    must_exist: bool | Callable[[Any], bool] = False,
    from_data: bool = False,
) -> T:
    """A field of `Options`.

    Args:
        may_change: its value may differ when a run is continued: it does not change what is computed.
        must_exist: it is a file or a folder that is read; or whether it is, by the settings.
        from_data: where neither the user nor a recipe names it, it follows from the data (`options.derived`).
    """
    marks = {"limits": limits, "may_change": may_change, "must_exist": must_exist, "from_data": from_data}
    return field(default=default, metadata=marks)  # type: ignore[no-any-return, call-overload]


FROM_DATA = {"from_data": True}
"""Metadata of a field whose default is made, as `option`."""
READ = {"must_exist": True}
"""Metadata of a field without a default, as `option`."""


def marked(settings: Any, mark: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the fields that have a mark of `option`, those of nested settings included."""
    for member in fields(settings):
        name, value, found = prefix + member.name, getattr(settings, member.name), member.metadata.get(mark)
        if is_dataclass(value):
            yield from marked(value, mark, f"{name}.")
        elif found(settings) if callable(found) else found:
            yield name, value


def flatten(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, their keys joined."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        leaves |= flatten(value, separator, f"{prefix}{key}{separator}") if nested else {f"{prefix}{key}": value}
    return leaves


def value_of(settings: Any, name: str) -> Any:
    """What a dotted name has."""
    return reduce(getattr, name.split("."), settings)


def with_values(settings: T, values: Mapping[str, Any]) -> T:
    """A copy with other values by their dotted names; a list, as files have them, becomes a tuple where one was."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        own, _, rest = name.partition(".")
        if rest:
            changes[own] = with_values(changes.get(own, getattr(settings, own)), {rest: value})
        else:
            was = getattr(settings, own)
            changes[own] = tuple(value) if isinstance(was, tuple) and isinstance(value, list) else value
    return replace(settings, **changes)  # type: ignore[type-var]
