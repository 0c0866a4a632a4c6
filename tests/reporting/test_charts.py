"""The report's drawings: what is drawn, and what is left out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from lolcats_cli.reporting.charts import HEAT, TOP, WIDTH, Axis, Series, color_at, heatmap, label, line_chart

ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)


def places(svg: str) -> list[tuple[float, float]]:
    """The points of all lines."""
    found = " ".join(re.findall(r'polyline[^>]* points="([^"]*)"', svg)).split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found)]


@given(st.lists(st.tuples(ANY, ANY), max_size=12), st.booleans(), st.booleans())
def test_any_numbers_make_well_formed_svg_within_its_frame(points, log_x, log_y) -> None:
    svg = line_chart("a < b", [Series("x & y", points, "red")], Axis("x", log_x), Axis("y", log_y))
    drawable = [
        (x, y)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]
    assert bool(svg) == bool(drawable)
    if svg:
        ElementTree.fromstring(svg)
        assert len(places(svg)) == (len(drawable) if len(drawable) > 1 else 0)
        assert all(0 <= x <= WIDTH and y >= 0 for x, y in places(svg))


def test_a_line_goes_where_its_numbers_say() -> None:
    svg = line_chart("t", [Series("s", [(0, 1), (5, 10), (10, 100)], "red")], Axis("x"), Axis("y", log=True))
    (x0, y0), (x1, y1), (x2, y2) = places(svg)
    assert (x1 - x0, y0 - y1) == (x2 - x1, y1 - y2)  # equal steps of a straight line on the logarithmic axis
    assert y2 == TOP < y0


@given(st.lists(st.lists(ANY, min_size=1, max_size=5), min_size=1, max_size=5))
def test_a_heatmap_has_a_cell_per_value(rows) -> None:
    svg = heatmap("t", [(str(n), row) for n, row in enumerate(rows)], "head", "layer")
    assert bool(svg) == any(math.isfinite(value) and value > 0 for row in rows for value in row)
    if svg:
        ElementTree.fromstring(svg)
        assert svg.count("<rect") == sum(map(len, rows))


def test_the_ends_of_the_scale_are_the_least_and_the_largest_value() -> None:
    svg = heatmap("t", [("0", [0.001, 0.1]), ("1", [float("nan"), 0.01])], "head", "layer")
    fills = re.findall(r'<rect[^>]* fill="([^"]*)"', svg)
    assert fills == [color_at(0, HEAT), color_at(1, HEAT), "none", color_at(0.5, HEAT)]
    assert "0.1%" in svg and "10%" in svg


def test_labels() -> None:
    assert [label(value) for value in (0, 1024, 0.5, 0.00052, -2.5, 1e-7)] == [
        "0", "1,024", "0.5", "5.2e-4", "-2.5", "1e-7"
    ]  # fmt: skip
    assert [label(value, "B") for value in (12, 1_500, 2.25e9, 3e15)] == ["12 B", "1.5 kB", "2.25 GB", "3e+03 TB"]
    assert label(0.0333, "%") == "3.33%"
