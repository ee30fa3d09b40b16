from __future__ import annotations

import math
import re

import pytest
from pages import Page

from sparsemae.report.charts import HEIGHT, POINTS, WIDTH, _axis, _log_axis, heat_map, line_chart

PATH = re.compile(r'class="line s\d" d="M([^"]*)"')


def places(chart: str) -> list[list[tuple[float, float]]]:
    """Of each line's points, on the drawing."""
    return [[(float(x), float(y)) for x, y in (p.split() for p in path.split("L"))] for path in PATH.findall(chart)]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.42, 0.43), (3, 3), (0, 0), (-2, -2), (1e-9, 2e-9), (0, 123456), (-5, 7), (99.7, 100)]
)
@pytest.mark.parametrize("tight", [False, True])
def test_an_axis_has_a_few_round_numbers_within_its_limits(low: float, high: float, tight: bool) -> None:
    bottom, top, ticks = _axis(low, high, tight=tight)
    slack = 1e-6 * (top - bottom)
    assert bottom <= low + slack
    assert top >= high - slack
    assert all(bottom - slack <= tick <= top + slack for tick in ticks)
    assert tight or (2 <= len(ticks) <= 7 and top > bottom)
    for tick in ticks:
        digits = f"{abs(tick):.12e}".split("e")[0].rstrip("0")
        assert len(digits) <= 5, tick


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    assert _log_axis(0.002, 0.3) == (-3, 0, pytest.approx([1e-3, 1e-2, 1e-1, 1.0]))
    assert _log_axis(0.01, 0.01)[:2] == (-2, -1)
    assert len(_log_axis(1e-12, 1.0)[2]) <= 6


def test_points_lie_where_their_values_say() -> None:
    chart = line_chart("Loss", "", {"a": [(0, 4.0), (1, 2.0), (2, 0.0)]})
    (((x0, y0), (x1, y1), (x2, y2)),) = places(chart)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y2  # up is more
    grid = {float(y): float(tick) for y, tick in re.findall(r"x=40 y=([\d.]+) text-anchor=end>([\d.]+)<", chart)}
    assert {round(y - 3.5, 1) for y in grid} >= {y0, y2}
    assert ">epoch<" in chart


def test_fractions_are_percent_and_errors_are_shaded() -> None:
    chart = line_chart("Top-1", "%", {"top-1": [(1, 0.5), (2, 0.9)]}, errors=[0.05, 0.02], mark=2.0)
    assert "Top-1, last: top-1 90" in chart
    assert 'class="band s0"' in chart
    assert "class=mark" in chart


def test_a_long_run_is_averaged_and_nothing_that_is_no_number_is_drawn() -> None:
    many = [(i / 100, math.sin(i / 1000)) for i in range(100_000)]
    chart = line_chart("Loss", "", {"a": many})
    assert len(places(chart)[0]) == POINTS
    assert len(chart) < 12_000
    assert line_chart("Loss", "", {"a": [(0, math.nan), (1, math.inf)], "b": []}) == ""
    zeros = line_chart("Flips", "", {"a": [(0, 0.0), (1, 0.1), (2, 0.01)]}, log=True)
    assert len(places(zeros)[0]) == 2


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '" onload="x', "$\\frac{1}{0}$ &amp; 雪 \udce9"])
def test_names_are_escaped_and_all_that_opens_closes(evil: str) -> None:
    chart = line_chart(evil, evil, {evil: [(0, 1.0), (1, 2.0)], "other": [(0, 1.0)]}, evil, x_label=evil)
    chart += heat_map(evil, evil, {evil: [0.1, 0.0], "b": [0.2, 0.3]}, (1, 2), evil)
    chart.encode()  # a file name need not be Unicode
    page = Page(chart)
    assert page.words.count(evil.encode(errors="replace").decode()) >= 6
    assert not page.open
    assert not {"onload", "script"} & {*page.names}


def test_a_heat_map_of_many_epochs_is_a_small_picture() -> None:
    rows = {f"blocks.{i}": [1 / (1 + i + epoch) for epoch in range(2000)] for i in range(48)}
    chart = heat_map("Flips", "", rows, (1, 2000), "Moves.")
    assert len(chart) < 40_000
    assert "From 0.00049" in chart
    assert heat_map("Flips", "", {"a": [0.0, 0.0]}, (1, 2), "") == ""
    assert WIDTH > HEIGHT
