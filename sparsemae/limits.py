"""Limits of settings, checked when a configuration is made: one line that says what was wanted and what was got."""

import math
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar

UNIT_INTERVAL = (0.0, 1.0)
AT_LEAST_0 = (0.0, math.inf)
AT_LEAST_1 = (1.0, math.inf)
ABOVE_0 = (math.ulp(0.0), math.inf)
UP_TO_1 = (math.ulp(0.0), 1.0)
BELOW_1 = (0.0, math.nextafter(1.0, 0.0))

T = TypeVar("T")


def check_limits(settings: Any, prefix: str, **limits: tuple[float, float]) -> None:
    """Raises ValueError, naming ``prefix`` and field, if a number (or one of a tuple) is below or above its limits.

    None passes.
    """
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple | list) else () if value is None else (value,)
        if not all(least <= number <= most for number in numbers):  # nan is within none
            shown = list(value) if isinstance(value, tuple) else f"{value:g}"
            raise ValueError(f"{prefix}{name}: wanted {_range(least, most)}, got {shown}")


def _range(least: float, most: float) -> str:
    low = "more than 0" if least == ABOVE_0[0] else f"at least {least:g}"
    high = "below 1" if most == BELOW_1[1] else f"at most {most:g}"
    return low if most == math.inf else f"{low} and {high}"


def may_change(default: T) -> T:
    """A field whose value may differ when a run is continued: it does not change what is computed."""
    return field(default=default, metadata={"may_change": True})  # type: ignore[no-any-return, call-overload]


def fields_that_may_change(settings: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields made by `may_change`, those of nested settings included."""
    for member in fields(settings):
        value = getattr(settings, member.name)
        if is_dataclass(value):
            yield from fields_that_may_change(value, f"{prefix}{member.name}.")
        elif member.metadata.get("may_change"):
            yield prefix + member.name
