"""Limits of settings, checked when a configuration is made: one line that says what was wanted and what was got."""

from __future__ import annotations

import math
from typing import Any

SHARE = (0.0, 1.0)
AT_LEAST_0 = (0.0, math.inf)
AT_LEAST_1 = (1.0, math.inf)
ABOVE_0 = (math.ulp(0.0), math.inf)
UP_TO_1 = (math.ulp(0.0), 1.0)
BELOW_1 = (0.0, math.nextafter(1.0, 0.0))


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
