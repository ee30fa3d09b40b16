"""Charts as inline SVG, drawn by hand: a few kilobytes each, in the page's own colors, which follow its light or dark.

A plotting library's SVG would be ten times as large, with its own fonts and a white ground.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsemae.report.markup import escaped

WIDTH, HEIGHT = 360, 216
"""Of a chart, in its own units, which are px where three stand in a row."""
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
POINTS = 400
"""Of a line; more are averaged, neighbor with neighbor."""
COLUMNS = 120
"""Of a heat map."""
Points = Sequence[tuple[float, float]]


def line_chart(
    title: str, unit: str, lines: Mapping[str, Points], about: str = "", log: bool = False,
    errors: Sequence[float] | None = None, mark: float | None = None, x_label: str = "epoch",
) -> str:  # fmt: skip
    """Quantities over the epochs, a line each; nothing where no line has a point.

    Args:
        unit: of the values; "%": they are fractions.
        about: one sentence on what is seen.
        log: logarithmic axis; values of 0 have no place on it.
        errors: of the only line's points, shaded.
        mark: an epoch to point out.
    """
    scale = 100.0 if unit == "%" else 1.0
    kept = {name: _reduced([(x, scale * y) for x, y in points if _drawable(y, log)]) for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    values = [y for points in kept.values() for _, y in points]
    if errors is not None and len(errors) == len(values):
        values += [y + sign * scale * error for (y, error) in zip(values, errors, strict=True) for sign in (-1, 1)]
    low, high, ticks = _log_axis(min(values), max(values)) if log else _axis(min(values), max(values))
    last = max(x for points in kept.values() for x, _ in points)
    first = min(0.0, *(x for points in kept.values() for x, _ in points))
    across, up = (WIDTH - LEFT - RIGHT) / max(last - first, 1e-9), HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        if log:
            y = math.log10(y)
        return LEFT + (x - first) * across, TOP + up * (high - y) / (high - low)

    parts = []
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<path class=grid d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text class=tick x={LEFT - 6} y={y + 3.5:.1f} text-anchor=end>{_number(tick)}</text>")
    for tick in _axis(first, last, 5, tight=True)[2]:
        x = place(tick, 1.0)[0]
        parts.append(f"<text class=tick x={x:.1f} y={HEIGHT - BOTTOM + 15} text-anchor=middle>{_number(tick)}</text>")
    parts.append(f"<text class=tick x={WIDTH - RIGHT} y={HEIGHT - 4} text-anchor=end>{escaped(x_label)}</text>")
    if mark is not None:
        x = place(mark, 1.0)[0]
        parts.append(f'<path class=mark d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    if errors is not None and len(kept) == 1 and len(errors) == len(next(iter(kept.values()))):
        (points,) = kept.values()
        both = [[place(x, y + sign * scale * e) for (x, y), e in zip(points, errors, strict=True)] for sign in (1, -1)]
        parts.append(f'<path class="band s0" d="M{_path(both[0])}L{_path(both[1][::-1])}Z"/>')
    color = {name: number % 8 for number, name in enumerate(lines)}  # on all charts the same
    for name, points in kept.items():
        placed = [place(x, y) for x, y in points]
        parts.append(f'<path class="line s{color[name]}" d="M{_path(placed)}"/>')
        for x, y in placed if len(placed) < 20 else placed[-1:]:
            parts.append(f'<circle class="dot s{color[name]}" cx={x:.1f} cy={y:.1f} r=2.2 />')
    names = "".join(f"<li><i class=s{color[name]}></i>{escaped(name)}</li>" for name in kept)
    legend = f"<ul class=legend>{names}</ul>" if len(lines) > 1 else ""
    end = ", ".join(f"{name} {_number(points[-1][1])}" for name, points in kept.items())
    label = escaped(f"{title}, last: {end}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{label}">{"".join(parts)}</svg>'
    return _figure(title, f"{unit}{', logarithmic' * log}", legend + svg, about)


def heat_map(
    title: str, unit: str, rows: Mapping[str, Sequence[float]], epochs: tuple[float, float], about: str
) -> str:
    """Values above 0 as shades, a row for each name and a column for each epoch; their logarithm is what is shaded."""
    values = np.array(list(rows.values()), np.float64)
    if values.shape[1] > COLUMNS:
        values = np.stack([part.mean(axis=1) for part in np.array_split(values, COLUMNS, axis=1)], axis=1)
    if not (values > 0).any():
        return ""
    low, high = values[values > 0].min(), values.max()
    with np.errstate(divide="ignore"):
        shade = np.log(values / low) / max(math.log(high / low), 1e-9)
    shade = np.where(values > 0, 0.08 + 0.92 * shade.clip(0, 1), 0)
    height = max(HEIGHT, 9 * len(rows) + TOP + BOTTOM)
    inner, names, parts = height - TOP - BOTTOM, list(rows), []
    step = inner / len(names)
    every = max(1, math.ceil(11 / step))
    for number in range(0, len(names), every):
        y = TOP + (number + 0.5) * step + 3.5
        parts.append(f"<text class=tick x=112 y={y:.1f} text-anchor=end>{escaped(names[number])}</text>")
    wide = 3 * WIDTH
    parts.append(
        f"<image x=118 y={TOP} width={wide - 118 - RIGHT} height={inner} preserveAspectRatio=none class=pixels "
        f'href="{_shades(shade)}"/>'
    )
    for tick, anchor, x in ((epochs[0], "start", 118), (epochs[1], "end", wide - RIGHT)):
        parts.append(
            f"<text class=tick x={x} y={height - BOTTOM + 15} text-anchor={anchor}>epoch {_number(tick)}</text>"
        )
    svg = f'<svg viewBox="0 0 {wide} {height}" role=img aria-label="{escaped(title)}">{"".join(parts)}</svg>'
    return _figure(
        title,
        unit,
        f"<div class=scroll>{svg}</div>",
        f"{about} From {low:.2g} (lightest) to {high:.2g}.",
        "chart whole",
    )


def _figure(title: str, unit: str, content: str, about: str, kind: str = "chart") -> str:
    said = f"<figcaption>{escaped(about)}</figcaption>" if about else ""
    return f'<figure class="{kind}"><h3>{escaped(title)} <small>{escaped(unit)}</small></h3>{content}{said}</figure>'


def _drawable(value: Any, log: bool) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not log)


def _reduced(points: Points) -> Points:
    if len(points) <= POINTS:
        return points
    parts = np.array_split(np.array(points, np.float64), POINTS)
    return [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in parts)]


def _axis(low: float, high: float, count: int = 4, tight: bool = False) -> tuple[float, float, list[float]]:
    """Limits and about ``count`` round numbers within them; ``tight``: the limits are kept."""
    if high == low and not tight:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if tight:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return low, high, [number * step for number in range(first, last + 1)]
    last += first == last
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Limits as powers of ten, and the powers between them."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last += first == last
    return first, last, [10.0**power for power in range(first, last + 1, -(-(last - first) // 5))]


def _number(value: float) -> str:
    return f"{value:,.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _shades(shade: NDArray[np.float64]) -> str:
    """A picture of the accent color, more or less opaque, so that it does on a light ground and on a dark one."""
    pixels = np.empty((*shade.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (62, 124, 230), (255 * shade).round()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
